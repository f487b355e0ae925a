"""The whole proof, or a part of it: ``make proof``, ``make proof ONLY="llama dp2 tp2"``."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from proof.cases import KEYS, cover, one_by_one, values_cover
from proof.running import TYPED, run, table, write


def main() -> int:
    parser = argparse.ArgumentParser(prog="proof", description=__doc__)
    parser.add_argument("--only", default="", help="a case's name, or a part of it")
    parser.add_argument("--part", choices=("all", "plain", "cover", "subset"), default="all")
    parser.add_argument("--without", default="", help="comma-separated KEY=VALUE: leave out cases with these values")
    parser.add_argument("--with", dest="given", default="", help="comma-separated KEY=VALUE: only cases with these")
    parser.add_argument("--list", action="store_true", help="print the names and stop")
    parser.add_argument("--no-types", action="store_true", help="leave out the type checks")
    parser.add_argument("--out", type=Path, default=Path("build/proof"))
    args = parser.parse_args()

    cases = dict.fromkeys((*one_by_one(), *cover()))
    parts = {"all": list(cases), "plain": list(one_by_one()), "cover": list(cover()), "subset": list(values_cover())}
    chosen = [case for case in parts[args.part] if str(case) == args.only] or [
        case for case in parts[args.part] if args.only in str(case)
    ]
    for text in filter(None, args.without.split(",")):
        key, _, value = text.partition("=")
        chosen = [case for case in chosen if str(case[key]) != value]
    for text in filter(None, args.given.split(",")):
        key, _, value = text.partition("=")
        assert key in KEYS, key
        chosen = [case for case in chosen if str(case[key]) == value]
    if not chosen:
        print(f"no case has {args.only!r} in its name; --list names them", file=sys.stderr)
        return 2
    if args.list:
        print("\n".join(map(str, chosen)))
        return 0
    begin = time.perf_counter()
    outcomes = run(chosen, args.out / "cases", () if args.no_types else TYPED)
    write(outcomes, args.out)
    print(table(outcomes))
    failed = [outcome for outcome in outcomes if outcome.failures]
    for outcome in failed:
        print("\n" + "\n".join(outcome.failures) + f'\nalone: make proof ONLY="{outcome.case}"')
    minutes = (time.perf_counter() - begin) / 60
    print(f"\n{len(outcomes) - len(failed)} of {len(outcomes)} cases hold, {len(failed)} fail, in {minutes:.1f} min")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
