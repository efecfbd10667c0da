"""What the exit status of a rank says, to shells and to its supervisor."""

EXIT_DONE = 0  # trained, or nothing to do, or stopped on request
EXIT_FAILED = 1  # a mistake that the same command would meet again
EXIT_USAGE = 2
EXIT_DEFECT = 70  # EX_SOFTWARE of sysexits.h: an exception of ours, of a library, or of a user's task
EXIT_PEER_LOST = 75  # EX_TEMPFAIL: start it again
EXIT_INTERRUPTED = 130
