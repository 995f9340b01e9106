"""vLLM's own command-line options with PTE's among them.

`parse` reads options as ``vllm serve`` does (its parser, its config files) and puts what `engine_args` says into the
result. An option that contradicts PTE ends in a ValueError: here where PTE sets it, in `settings.check` otherwise, and
both before an engine is started.
"""

from argparse import Namespace
from collections.abc import Sequence
from typing import Any

from verl_pte.vllm.settings import check


def parse(engine_args: dict[str, Any], options: Sequence[str]) -> Namespace:
    """The arguments of ``vllm serve MODEL OPTIONS`` under PTE.

    Args:
        engine_args: from `verl_pte.vllm.engine_args`.
        options: vLLM's options as on a command line; the parser exits with status 2 where it does not know one.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser(prog="vllm")
    command = ServeSubcommand()
    parser_of_serve = command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args([command.name, engine_args["model"], *options])
    args.model = args.model_tag
    for key, value in engine_args.items():
        if key != "model":
            setattr(args, key, _combined(key, getattr(args, key), parser_of_serve.get_default(key), value))
    try:
        command.validate(args)
    except TypeError as error:  # vLLM's for options that need each other
        raise ValueError(str(error)) from error
    return args


def checked_config(engine_args: Any, usage_context: Any) -> Any:
    """The VllmConfig of vLLM's EngineArgs. Raises ValueError for options PTE or vLLM cannot honour."""
    from pydantic import ValidationError

    try:
        vllm_config = engine_args.create_engine_config(usage_context)
    except ValidationError as error:  # a ValueError whose text is mostly about pydantic
        raise ValueError("; ".join(detail["msg"] for detail in error.errors())) from error
    check(vllm_config)
    return vllm_config


def _combined(key: str, given: Any, default: Any, ours: Any) -> Any:
    if isinstance(ours, dict):
        given = given or {}
        clash = [name for name in ours if given.get(name, ours[name]) != ours[name]]
        if clash:
            raise ValueError(f"{key}: {clash[0]}={given[clash[0]]!r} would replace what PTE sets there; leave it out")
        return {**given, **ours}
    if given not in (default, ours):
        raise ValueError(f"{key}={given!r}: must be {ours!r} with PTE; leave it out")
    return ours
