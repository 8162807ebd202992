"""A page in the browser: draw, and see the picture follow; photographs, trainings and files.

    python -m tools.page

needs the package gradio (pip install gradio). The page is served to this machine alone, at http://127.0.0.1:7860, and
asks for nothing outside it. Pictures are saved in --out as infer.py saves them; trainings are those in --runs, and go
on when the page ends.
"""

import argparse
import os
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from controlnet.common.program import new_parser, positive
from tools.cli import make_folder, run_tool


def main(argv: list[str] | None = None) -> int:
    parser = new_parser("python -m tools.page", __doc__)
    parser.add_argument("--out", type=Path, default=Path("out"), help="where pictures go (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where trainings are (default: %(default)s)")
    parser.add_argument("--port", type=positive, default=7860, help="(default: %(default)s)")
    parser.add_argument("--open", action="store_true", help="open it in the browser")
    return run_tool(parser, argv, serve, stopped="trainings go on")


def serve(args: argparse.Namespace) -> None:
    """Until it is stopped. What browsers send and get lies in a folder of this page's own, which ends with it."""
    if args.port >= 2**16:
        raise ValueError(f"--port is {args.port}, expected one up to {2**16 - 1}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for folder, option in ((args.out, "--out"), (args.runs, "--runs")):
        make_folder(folder, option)
    with TemporaryDirectory(prefix="page-") as folder:
        # Before gradio is imported, which would ask the network for its version and tell what is used.
        os.environ.update(GRADIO_ANALYTICS_ENABLED="False", HF_HUB_OFFLINE="1", GRADIO_TEMP_DIR=folder)
        from controlnet.common.devices import optional

        optional("gradio", "the page")
        from .layout import CSS, THEME, page

        blocks = page(args.out, args.runs)
        try:
            blocks.launch(
                server_name="127.0.0.1",
                server_port=args.port,
                prevent_thread_lock=True,
                share=False,
                quiet=True,
                ssr_mode=False,
                run_history=False,
                inbrowser=args.open,
                theme=THEME,
                css=CSS,
                footer_links=[],
                allowed_paths=[str(args.out.resolve()), str(args.runs.resolve())],
            )
        except OSError as error:
            raise ValueError(f"port {args.port} is taken, or not yours to use: give another --port") from error
        print(f"http://127.0.0.1:{args.port}", flush=True)
        blocks.block_thread()


if __name__ == "__main__":
    sys.exit(main())
