"""`instructgpt-hf push`: upload a run's stages to the Hub."""

from __future__ import annotations

import argparse
from pathlib import Path

from instructgpt_hf.cli.command import Verbs, add_quiet


def add(verbs: Verbs) -> None:
    """Add the verb."""
    parser = verbs.add("push", "upload a run's stages to the Hub", "instructgpt-hf push runs/tiny-cpu", _push)
    parser.add_argument("run", metavar="RUN", help="folder of a run, such as runs/tiny-cpu")
    parser.add_argument("--hub_namespace", metavar="NAME", help="user or organization (default: the logged-in user)")
    parser.add_argument("--prefix", metavar="NAME", help="start of the repositories' names (default: the recipe's)")
    parser.add_argument("--public", action="store_true", help="make the repositories public (default: private)")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="which stages (default: every finished one)")
    add_quiet(parser)


def _push(arguments: argparse.Namespace) -> None:
    from instructgpt_hf.hub.publish import push_run
    from instructgpt_hf.stages.output import Output, Phase

    run, private = Path(arguments.run), not arguments.public
    with Output(quiet=arguments.quiet) as output:
        output.open_log(run)
        with output.phase(Phase(f"pushing {run} to the Hub", bar=False)):
            push_run(
                run,
                arguments.hub_namespace,
                private=private,
                stages=arguments.stages,
                prefix=arguments.prefix,
                console=output.results,
            )
