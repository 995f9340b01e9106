"""vLLM's OpenAI-compatible server on a PTE model: what ``verl-pte serve`` runs.

It is vLLM's server as it stands, started the way ``vllm serve`` starts it. What PTE knows about a response rides in its
field `kv_transfer_params`, under `pte` (scheduler.py): with `n` = 1 and without streaming, for which vLLM leaves that
field out.
"""

import errno
from argparse import Namespace


def serve(args: Namespace) -> None:
    """Check the arguments (from options.py) and serve until a signal ends it.

    Raises ValueError, before anything is loaded, for what PTE or vLLM cannot honour and for a port that is taken.
    """
    from vllm import AsyncEngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.usage.usage_lib import UsageContext

    from verl_pte.vllm.options import checked_config

    cli_env_setup()
    checked_config(AsyncEngineArgs.from_cli_args(args), UsageContext.OPENAI_API_SERVER)
    try:
        ServeSubcommand.cmd(args)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES):
            raise
        raise ValueError(f"host={args.host}, port={args.port}: {error.strerror or error}") from error
