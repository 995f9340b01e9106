"""Settings for tests that import vLLM themselves."""

import os

from vllm_run import ENVIRONMENT

os.environ.update(ENVIRONMENT)
