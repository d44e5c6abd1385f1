"""What a rehearsal runs in the place of every command: it works, fails, hangs, crashes, or leaves a child behind.

    python stub.py STAGE BEHAVIOUR

Before anything else it prints one line of JSON, as the stages do, which must not be lost.
"""

import json
import os
import signal
import subprocess
import sys
import time


def main() -> int:
    stage, behaviour = sys.argv[1:]
    line = {"device": "a rehearsal"} if stage == "device" else {"line": stage}
    print(json.dumps(line), flush=True)
    if behaviour == "fails":
        print("this went wrong")
        return 1
    if behaviour == "hangs":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    if behaviour == "crashes":
        os.kill(os.getpid(), signal.SIGSEGV)
    if behaviour == "forks":  # a child that holds the output and outlives its parent
        subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
