"""`fedsplit`: one command, a subcommand per thing a user does.

An error that the user can mend is one sentence on standard error and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

from fedsplit.cli import bundle, certify, device, report, sweep, verify, watch
from fedsplit.types import FedsplitError

if TYPE_CHECKING:  # a command imports what it needs when it runs: `fedsplit --help` is quick
    from fedsplit.cli.progress import Bar, Quiet
    from fedsplit.config import Config

Handler = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = build()
    options = parser.parse_args(arguments)
    try:
        handler: Handler = options.handler
        return handler(options)
    except FedsplitError as error:
        print(f"fedsplit: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fedsplit: stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever read the output, such as `head`, has enough of it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def build() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    parser = _Parser(prog="fedsplit", description="Federated split fine-tuning of vision transformers.")
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = _add(commands, "run", _run, "run a config in this process and print the run folder's path last")
    _config_options(run)
    run.add_argument("--out", help="run folder; the same as --set out=DIR")
    run.add_argument("--workers", type=int, help="processes that run clients; the same as --set engine.workers=N")
    run.add_argument("--quiet", action="store_true", help="print only the run folder's path")

    resume = _add(commands, "resume", _resume, "go on with a run that stopped")
    resume.add_argument("run", help="run folder")
    resume.add_argument("--rounds", type=int, help="go on to this many rounds in all")
    resume.add_argument("--workers", type=int, help="processes that run clients")
    resume.add_argument("--quiet", action="store_true", help="print only the run folder's path")

    sweep.add(commands)

    picture = _add(commands, "map", _map, "draw the data path with the pieces that a config puts on it")
    picture.add_argument("config", nargs="?", help="TOML file; the defaults if left out")
    picture.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key")

    plan = _add(commands, "plan", _plan, "say what a config computes, holds and sends, without running it")
    _config_options(plan)
    whole = "FedAvg full fine-tuning if left out; the run's data, model, devices and passes where it does not say"
    plan.add_argument("--against", metavar="F.toml", help=f"config to compare with: {whole}")
    plan.add_argument("--json", action="store_true", help="one JSON document")
    plan.add_argument("--choose", action="store_true", help="choose values for each kind of device of the fleet")
    tries = "with --choose: values to weigh, preferred first (default: the cut and the batch); repeatable"
    plan.add_argument("--try", dest="tries", action="append", default=[], metavar="KEY=V|V|V", help=tries)
    bounds = (
        "with --choose: a bound on seconds, bytes, joules, memory_bytes or storage_bytes of a client and round, or on "
        "the blocks at the front, which are at least so many"
    )
    plan.add_argument("--limit", action="append", default=[], metavar="NAME=X", help=bounds)
    plan.add_argument("--write", metavar="F.toml", help="with --choose: write the chosen config there")

    audit = _add(commands, "audit", _audit, "attack a finished run, and say what its activations give away")
    audit.add_argument("run", nargs="?", help="run folder; without it, --config and the weights that it starts from")
    audit.add_argument("--suite", default="quick", metavar="NAME", help="quick (default), standard or full")
    _config_options(audit)
    audit.add_argument("--out", metavar="DIR", help="folder of the audit; RUN/audit if left out")
    gates = (
        ("ssim", "mean SSIM of the strongest attack"),
        ("psnr", "mean PSNR (dB) of the strongest attack"),
        ("identified", "fraction of recognised reconstructions"),
        ("labels", "fraction of inferred labels"),
    )
    for gate, what in gates:
        audit.add_argument(f"--max-{gate}", type=float, metavar="X", help=f"exit code 3 if above X: {what}")
    audit.add_argument("--json", action="store_true", help="one JSON document")

    keys = _add(commands, "keys", _keys, "list every config key: type, default, range, meaning")
    keys.add_argument("prefix", nargs="?", default="", help="only keys that start with this")
    keys.add_argument("--json", action="store_true", help="one JSON document")

    doctor = _add(commands, "doctor", _doctor, "check this installation and say how to mend it")
    doctor.add_argument("--json", action="store_true", help="one JSON document")
    what = "measure this machine's rates for the client's part of a config, and write a profile for devices.fleet"
    doctor.add_argument("--calibrate", action="store_true", help=what)
    _config_options(doctor)
    doctor.add_argument("--out", metavar="F.toml", help="file of the profile (with --calibrate)")
    device.add(doctor)

    certify.add(commands)
    bundle.add(commands)
    report.add(commands)
    verify.add(commands)
    watch.add(commands)

    pretrain = _add(commands, "pretrain", _pretrain, "train a small backbone from scratch on a folder of images")
    pretrain.add_argument("--config", action="append", default=[], metavar="F.toml", help="TOML file of pretrain keys")
    pretrain.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one pretrain key")
    pretrain.add_argument("--out", help="folder of checkpoint, card and weights; an existing one is resumed")

    harden = _add(
        commands, "harden", _harden, "prune and train a front offline against inversion, for model.checkpoint"
    )
    _config_options(harden)
    harden.add_argument("--out", help="folder of checkpoint, card and weights; an existing one is resumed")
    harden.add_argument("--quiet", action="store_true", help="print only the folder's path")
    return parser


class _Parser(argparse.ArgumentParser):
    """Says what is wrong with a command line in one sentence, too."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        self.exit(2, f"fedsplit: {message}; see: {self.prog} --help\n")


def _run(options: argparse.Namespace) -> int:
    from fedsplit.cli.progress import watcher
    from fedsplit.config import load
    from fedsplit.world import DEFAULT_DEVICES

    config = load(options.config, [*options.set, *_shorthand(options)])
    if config.resume:
        asked = any(pair.startswith("rounds=") for pair in options.set)
        return _continue(config.resume, {"rounds": config.rounds} if asked else {}, options.quiet)
    config = config.replace(devices__count=config.devices.count or DEFAULT_DEVICES)
    return _go(config, watcher(options.quiet))


def _resume(options: argparse.Namespace) -> int:
    more = {"rounds": options.rounds, "engine__workers": options.workers}
    return _continue(options.run, {name: value for name, value in more.items() if value is not None}, options.quiet)


def _continue(run: str, changes: dict[str, int], quiet: bool) -> int:
    from fedsplit.cli.progress import watcher
    from fedsplit.runs import RunFolder

    folder, config = RunFolder.open(run)
    asked = config.replace(resume=str(folder.path), **changes)
    # Runner and experiment must agree on the number of rounds: the schedule of the learning rate reads it.
    return _go(asked.replace(rounds=max(config.rounds, asked.rounds)), watcher(quiet))


def _go(config: Config, watching: Bar | Quiet) -> int:
    from fedsplit import experiment
    from fedsplit.runtime.inprocess import runner

    clients = runner(config)
    try:
        with watching:
            folder = experiment.run(config, clients, progress=watching)
    except KeyboardInterrupt:
        print("fedsplit: stopped; a run that had begun goes on with: fedsplit resume RUN", file=sys.stderr)
        return 130
    finally:
        clients.close()
    print(folder)
    return 0


def _map(options: argparse.Namespace) -> int:
    from fedsplit.cli.picture import draw
    from fedsplit.config import load

    print(draw(load([options.config] if options.config else [], options.set)))
    return 0


def _plan(options: argparse.Namespace) -> int:
    from fedsplit.cli.plan import document, show
    from fedsplit.config import load

    config = load(options.config, options.set)
    if options.choose:
        return _choose(config, options)
    if options.tries or options.limit or options.write:
        raise FedsplitError("--try, --limit and --write belong to --choose; add it.")
    found = document(config, options.against)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    return 0


def _choose(config: Config, options: argparse.Namespace) -> int:
    from fedsplit.cli.choose import document, show

    found = document(config, options.tries, options.limit, options.write)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        show(found)
    return 0


def _audit(options: argparse.Namespace) -> int:
    from fedsplit.cli.audit import carry_out

    return carry_out(options)


def _keys(options: argparse.Namespace) -> int:
    from fedsplit.config import keys

    chosen = [key for name, key in keys().items() if name.startswith(options.prefix)]
    if not chosen:
        raise FedsplitError(f"No config key starts with '{options.prefix}'; 'fedsplit keys' lists them all.")
    if options.json:
        fields = ("name", "default", "help", "low", "above", "high", "choices")
        rows = [{"type": key.type.__name__, **{name: getattr(key, name) for name in fields}} for key in chosen]
        print(json.dumps(rows, indent=2))
        return 0
    for key in chosen:
        bounds = ((">=", key.low), (">", key.above), ("<=", key.high))
        limits = ", ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        print(f"{key.name} = {key.default!r}  ({key.type.__name__}{', ' + limits if limits else ''})\n    {key.help}")
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from fedsplit import doctor

    if options.calibrate:
        from fedsplit.cli.calibrate import carry_out

        return carry_out(options)
    if options.device:
        return device.run(options)
    if options.config or options.set or options.out:
        raise FedsplitError("doctor takes --config and --set with --calibrate or --device, --out with --calibrate.")
    if options.superlink or options.root_certificates:
        raise FedsplitError("doctor takes --superlink and --root-certificates with --device; add it.")
    found = doctor.checks()
    print(doctor.as_json(found) if options.json else doctor.report(found))
    return 1 if any(check.level == "error" for check in found) else 0


def _pretrain(options: argparse.Namespace) -> int:
    from fedsplit import pretrain

    print(pretrain.run(pretrain.load(options.config, options.set), options.out))
    return 0


def _harden(options: argparse.Namespace) -> int:
    from fedsplit import harden

    print(harden.run(harden.load(options.config, options.set), options.out, quiet=options.quiet))
    return 0


def _add(
    commands: argparse._SubParsersAction[_Parser], name: str, handler: Handler, help: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help, description=help)
    parser.set_defaults(handler=handler)
    return parser


def _config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", action="append", default=[], metavar="F.toml", help="TOML file; repeatable, later ones win"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change one key; repeatable")


def _shorthand(options: argparse.Namespace) -> list[str]:
    pairs = [f"out={options.out}"] if options.out else []
    return pairs + ([f"engine.workers={options.workers}"] if options.workers is not None else [])


def _version() -> str:
    from fedsplit import __version__

    return f"fedsplit {__version__}"


if __name__ == "__main__":
    sys.exit(main())
