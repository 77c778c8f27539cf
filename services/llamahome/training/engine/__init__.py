"""The training engine: one frozen base, warm, and any number of LoRA adapters trained on it.

From the inside out: ``draws`` (dropout and start values from counters), ``slots`` (one adapter's
weights and gradients), ``optimizer``, ``lora`` (the linear layer), ``attention`` (sequences side by
side without padding), ``passes`` (what goes through the base at once), ``losses``, ``recompute``,
``memory``, ``warm`` (the base that runs passes), ``job`` (one job's life) with ``saving`` and
``checks`` (what its report proves), ``choosing`` and ``ticks`` (all jobs, tick by tick), and
``__main__`` (the process). Importing this package imports no torch.
"""
