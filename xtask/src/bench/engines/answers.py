"""Taking turns: one take for every line that is read. Standard output is for answers only."""
import json
import os
import sys

asked = json.loads(sys.argv[1])
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


def say(answer):
    print(json.dumps(answer), file=answers, flush=True)


def rows_text(rows):
    return "1 row" if rows == 1 else f"{rows} rows"


def token(i, row=0):
    return (i * 7919 + row * 104729 + 17) % asked["vocabulary"]


def serve(info, takes):
    """`takes`: what gives seconds, or seconds by name, by the name of the take."""
    say({"info": info, "takes": list(takes)})
    for line in sys.stdin:
        name = line.strip()
        try:
            found = takes[name]()
            say({"seconds": found if isinstance(found, dict) else {name: found}})
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})
