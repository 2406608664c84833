"""`mome serve`: an HTTP server that segments uploaded scans, with a page to look at the masks."""

from __future__ import annotations

import argparse

from mome.cli.parser import given_path
from mome.memory import parse_bytes
from mome.presets import bundled_models
from mome.threads import check_threads


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the command."""
    parser.add_argument(
        "-m",
        "--model",
        action="append",
        help="a model that is served: folder, bundled name or Hub id; may be repeated; default: all bundled models",
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at; default: this machine only")
    parser.add_argument("--port", type=int, default=8000, help="the TCP port; 0 for a free one")
    parser.add_argument("--token-file", type=given_path, help="file with the token; else the variable MOME_TOKEN")
    parser.add_argument("--keep", default="1h", help="how long results are kept, as in 30m")
    parser.add_argument("--max-upload", default="2GB", help="the largest upload")
    parser.add_argument("--queue", type=int, default=32, help="jobs that wait or are uploaded at a time")
    parser.add_argument("--data", type=given_path, help="folder of the queue; default: a temporary one")
    parser.add_argument("--time-limit", default="1h", help="how long one job may run")
    parser.add_argument("--client-timeout", default="30s", help="how long a client may pause")
    parser.add_argument("--connections", type=int, default=256, help="connections that are open at a time")
    parser.add_argument(
        "--allow-origin", action="append", default=[], help="web page that may call the server, as an OHIF viewer"
    )
    parser.add_argument("--dicomweb", help="URL of the archive from which an OHIF viewer names its series")
    parser.add_argument("--insecure", action="store_true", help="allow http to an archive on another machine")
    parser.add_argument("--device", help="cpu, cuda or cuda:1; default cpu")
    parser.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads")


def run(args: argparse.Namespace) -> int:
    """Runs the command until a signal ends it."""
    from mome.server.run import serve
    from mome.server.settings import ServerSettings, parse_duration, read_token

    check_threads(args.threads, "--threads")
    if args.dicomweb is not None:
        from mome.dicomweb.session import connect

        connect(args.dicomweb, insecure=args.insecure)  # before the model is loaded; nothing is sent
    serve(
        ServerSettings(
            models=tuple(args.model or bundled_models()),
            host=args.host,
            port=args.port,
            token=read_token(args.token_file),
            keep_s=parse_duration(args.keep),
            max_upload=parse_bytes(args.max_upload, "--max-upload"),
            queue=args.queue,
            data=args.data,
            device=args.device,
            precision=args.precision,
            threads=args.threads,
            time_limit_s=parse_duration(args.time_limit),
            client_timeout_s=parse_duration(args.client_timeout),
            connections=args.connections,
            origins=tuple(args.allow_origin),
            dicomweb=args.dicomweb,
            insecure=args.insecure,
        )
    )
    return 0
