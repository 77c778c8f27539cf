"""Queues, doorbells, admission, and the stage runner: what happens around every stage, once.

Cheap to import: celery comes in with ``worker``, ``doorbell`` and ``submissions`` only.
"""
