"""How a process of several ends when something goes wrong: one line, a code, and no waiting.

  code  what happened                                       the same command
  2     an error that the user can mend                     after mending it
  75    another process was lost (EX_TEMPFAIL)              continues
  128+N the signal N asked to stop; a checkpoint was saved  continues

JAX's own end of a process waits for all the others, dead ones too; so after an error that not all
share the process ends at once (`os._exit`). The others notice by a broken connection, within
seconds, or where the network is silent by the heartbeat, within --heartbeat_timeout: then JAX
aborts the process, and `last_words` has it say why.
"""

import contextlib
import ctypes
import os
import signal
import sys
import time
import traceback

LOST = 75
LINGER = 2.0  # seconds that process 0 waits: its end breaks connections that others report first
LOST_LINE = (
    "error: another process of this run was lost (killed, or its machine or network is gone): "
    "this one stops too; the same command on every host continues from the last checkpoint"
)
# What JAX, gloo, NCCL, Orbax and the coordination service say when a peer does not answer.
SIGNS = ("gloo", "connection", "unavailable", "deadline_exceeded", "heartbeat", "socket closed")
SIGNS += ("coordination", "barrier", "nccl", "aborted", "distributed runtime")


@contextlib.contextmanager
def ends_the_process(own: int, agreed: type[Exception]):
    """Every end of this block is an end of the process that waits for no dead one.

    Args:
      own: this process's number.
      agreed: the error that every process raises at the same place.
    """
    import jax

    with last_words(LOST_LINE, LOST):
        try:
            yield
        except agreed:
            _shut_down(jax)
            if own:
                sys.exit(2)  # process 0 says it
            raise
        except SystemExit as exit_:
            if exit_.code not in (0, None) and not (
                isinstance(exit_.code, int) and exit_.code > 128
            ):
                _end(str(exit_.code), 1)
            _shut_down(jax)
            raise
        except KeyboardInterrupt:
            _end("", 128 + signal.SIGINT)
        except BaseException as error:
            _end(*describe(error, own), linger=0 if own else LINGER)
        else:
            _shut_down(jax)


def describe(error: BaseException, own: int) -> tuple[str, int]:
    """The line and the exit code for an error that only this process may have."""
    from moe.errors import UsageError

    if isinstance(error, UsageError):
        return f"error: process {own}: " + " ".join(str(error).split()), 2
    if is_lost_peer(error):
        return LOST_LINE, LOST
    return "".join(traceback.format_exception(error)), 1


def is_lost_peer(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is JAX's for a process that does not answer."""
    import jax

    while error is not None:
        text = str(error).lower()
        # What fails while it is dispatched comes as a ValueError.
        known = isinstance(error, jax.errors.JaxRuntimeError)
        known = known or any(sign in text for sign in ("gloo", "nccl", "barrier"))
        if known and any(sign in text for sign in SIGNS):
            return True
        error = error.__cause__ or error.__context__
    return False


def _shut_down(jax) -> None:
    """JAX's end in good order; another's death meanwhile changes nothing about this one's."""
    sys.stdout.flush()
    with contextlib.suppress(Exception):
        jax.distributed.shutdown()


def _end(line: str, code: int, linger: float = 0.0) -> None:
    sys.stdout.flush()
    if line:
        print(line, file=sys.stderr, flush=True)
    time.sleep(linger)
    os._exit(code)


@contextlib.contextmanager
def last_words(line: str, code: int, quiet: bool = False):
    """Inside, an abort of the process prints `line` and exits with `code`.

    JAX logs a page and aborts where the coordination service is lost; Python's own signal handlers
    would never run, so this one is C's.

    Args:
      quiet: hide what C++ prints meanwhile.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    screen = os.dup(2)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def speak(number):
        os.write(screen, f"{line}\n".encode())
        os._exit(code)

    old = libc.signal(signal.SIGABRT, ctypes.cast(speak, ctypes.c_void_p))
    if quiet:
        sys.stderr.flush()
        hidden = os.open(os.devnull, os.O_WRONLY)
        os.dup2(hidden, 2)
        os.close(hidden)
    try:
        yield
    finally:
        if quiet:
            sys.stderr.flush()
            os.dup2(screen, 2)
        libc.signal(signal.SIGABRT, old)
        os.close(screen)
