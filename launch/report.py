"""Compare results of tasks: a table in Markdown with intervals, differences item by item, and plots.

    python -m launch.report runs/a/evaluations/1000/suite-gpt3.json runs/b/evaluations/1000/suite-gpt3.json --out=report

Differences are to the first file. Results of other prompts, data, limits or versions do not compare: they are refused,
or marked with --force. docs/evaluation.md has the details.
"""

import argparse
from collections.abc import Sequence

from . import cli


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
      UserError: an argument is unknown, missing or malformed.
    """
    parser = cli.Parser("report", __doc__)
    add = parser.add_argument
    add("results", nargs="+", metavar="FILE.json", help="of launch.evaluate --tasks or --suite")
    add("--out", required=True, metavar="DIR", help="folder for report.md and the plots")
    force = "compare results of different items or versions too, and mark them"
    add("--force", action="store_true", help=force)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report, and return the exit code.

    Raises:
      UserError: the command line has a mistake, a file has no results, or results do not compare.
    """
    arguments = parse_arguments(argv)
    from fam_jax.evaluation.report import write_report  # imports matplotlib

    for path in write_report(arguments.results, arguments.out, force=arguments.force):
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
