"""Ends a process of several when something goes wrong: by one line and a code, without waiting.

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
import re
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
# How a runtime error of JAX begins, after its status, where a peer does not answer: a collective of
# gloo or NCCL whose connection broke, the coordination service that lost a task, any call that was
# given up waiting. Not gloo's "Received data size doesn't match": all live, and disagree.
BROKEN = r"closed by peer|reset by peer|broken pipe|time(d )?out|refused|no route|unreachable"
LOST_PEER = re.compile(
    r"(\w+: )*(Error dispatching computation: )*(\w+: )*"
    rf"(Gloo [\w -]+ failed: .*({BROKEN})"
    r"|NCCL operation .* failed: (remote process exited|unhandled system error)"
    r"|.*/job:jax_worker/)"
    r"|(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED): ",
    re.IGNORECASE | re.DOTALL,
)


@contextlib.contextmanager
def ends_the_process(own: int, agreed: type[Exception]):
    """Makes every end of this block an end of the process that waits for no dead one.

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
    """Returns the line and the exit code for an error that only this process may have."""
    from moe.errors import UsageError

    if isinstance(error, UsageError):
        return f"error: process {own}: " + " ".join(str(error).split()), 2
    if is_lost_peer(error):
        return LOST_LINE, LOST
    return "".join(traceback.format_exception(error)), 1


def is_lost_peer(error: BaseException | None) -> bool:
    """Tells whether an error, or one that it came from, is JAX's for a peer that does not answer.

    Only what JAX's runtime raises counts, by its type; what fails while a program is dispatched
    comes as a plain ValueError that begins with a status all the same.
    """
    import jax

    while error is not None:
        of_runtime = isinstance(error, jax.errors.JaxRuntimeError) or (
            type(error) is ValueError and re.match(r"[A-Z_]+: ", str(error))
        )
        if of_runtime and LOST_PEER.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _shut_down(jax) -> None:
    """Ends JAX in good order; another's death meanwhile changes nothing about this one's end."""
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
def last_words(line: str, code: int, number: int = signal.SIGABRT, quiet: bool = False):
    """Has an abort of the process print `line` and exit with `code`, inside of the block.

    JAX logs a page and aborts where the coordination service is lost; Python's own signal handlers
    would never run, so this one is C's.

    Args:
      line: the last words.
      code: the exit code.
      number: the signal that ends the process otherwise.
      quiet: hides what C++ prints meanwhile.
    """
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    screen = os.dup(2)

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def speak(_):
        os.write(screen, f"{line}\n".encode())
        os._exit(code)

    old = libc.signal(number, ctypes.cast(speak, ctypes.c_void_p))
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
        libc.signal(number, old)
        os.close(screen)
