"""Runs one command, waits for it, and prints what it took: a script of its own, `python -I -S waiter.py COMMAND...`.

A child begins as a copy of its parent, and the kernel counts that copy as the child's first peak of memory. So the
parent must be small: this one imports nothing but what the interpreter has built in, and no package of the project.

The command gets the environment and the folder of this script; all of its output goes to standard error. Printed are
its exit code, seconds of the clock, seconds of user and system time, and the peak in KiB, with blanks between.
"""

import os
import sys
import time


def main(command: list[str]) -> None:
    started = time.perf_counter()
    child = os.posix_spawnp(command[0], command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, 2, 1)])
    _, status, used = os.wait4(child, 0)
    wall_s = time.perf_counter() - started
    print(os.waitstatus_to_exitcode(status), wall_s, used.ru_utime + used.ru_stime, used.ru_maxrss)


if __name__ == "__main__":
    main(sys.argv[1:])
