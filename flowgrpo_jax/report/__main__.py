"""Write the page of a run: one HTML file that needs no network.

    python -m flowgrpo_jax.report --workdir runs/shapes
    python -m flowgrpo_jax.report --workdir runs/a --compare runs/b --out compared.html

    python -m flowgrpo_jax.report --workdir runs/shapes --serve

`train` writes it by itself after every evaluation. The work directories may be in buckets. With
`--serve` the page is at an address of this machine and follows the run; there the reward `vote` is
answered. From another machine: ssh -L 18091:127.0.0.1:18091 HOST.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from etils import epath

from flowgrpo_jax.command_line import user_errors
from flowgrpo_jax.report import page, run_data, server
from flowgrpo_jax.storage import files, outputs


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page and print where it is. Raises FileNotFoundError where there is no run."""
    args = parse(arguments)
    workdirs = [epath.Path(place) for place in [args.workdir, *args.compare]]
    if args.serve:
        server.serve(workdirs, epath.Path(args.votes), args.host, args.port)
        return
    out = epath.Path(args.out) if args.out else workdirs[0] / page.FILE
    budget = run_data.BYTES // len(workdirs)
    runs = [run_data.read(place, bytes_of_pictures=budget) for place in workdirs]
    outputs.check_file(out, "--out")
    files.replace(out, page.html(runs))
    print(out)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line. Exits with status 2 and a line that says what is wrong with it."""
    parser = argparse.ArgumentParser(
        "python -m flowgrpo_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--workdir", required=True, help="directory or bucket of the run")
    add("--compare", nargs="+", default=[], metavar="DIR", help="further runs, to be laid over it")
    add("--out", help=f"the HTML file to write; {page.FILE} in the work directory without it")
    add("--serve", action="store_true", help="show the page live, until Ctrl-C")
    add("--host", default="127.0.0.1", help="address to serve at (%(default)s); 0.0.0.0 for all")
    add("--port", type=int, default=18091, help="port to serve at (%(default)s)")
    add("--votes", default="votes", help="folder of the reward vote (%(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    with user_errors.in_one_line():
        main()
