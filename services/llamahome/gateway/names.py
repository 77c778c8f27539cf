"""Every name that clients of the HTTP door may rely on, and its limits."""

from __future__ import annotations

REQUEST_ID_HEADER = "x-request-id"
REPLAYED_HEADER = "idempotent-replayed"
IDEMPOTENCY_KEY_HEADER = "idempotency-key"
SHOULD_RETRY_HEADER = "x-should-retry"
SHA256_HEADER = "x-content-sha256"
# Sent by the stock OpenAI clients: 0, then 1, 2, ... for the tries of one call.
RETRY_COUNT_HEADER = "x-stainless-retry-count"

FILES_PATH = "/v1/files"
PURPOSES = ("assistants", "batch", "evals", "fine-tune", "user_data", "vision")
FINE_TUNE = "fine-tune"

EVENT_ID_PREFIX = "ftevent-"

# Submission ids of these forms are made here, so callers may not choose them.
KEY_SUBMISSION_PREFIX = "idempotency-key:"
BODY_SUBMISSION_PREFIX = "request-body:"

MAX_BODY_BYTES = 1024 * 1024
MAX_FILENAME_CHARS = 255
MIN_EXAMPLES = 10
RETRY_WINDOW_SECONDS = 600
# A retried upload of 8 GB may take hours; an equal file of the same day is the same upload.
UPLOAD_RETRY_WINDOW_SECONDS = 24 * 3600
# Waiting does not help against a quota; the stock clients give up at once beyond 120 s.
QUOTA_RETRY_AFTER_SECONDS = 300
UNAVAILABLE_RETRY_AFTER_SECONDS = 1
