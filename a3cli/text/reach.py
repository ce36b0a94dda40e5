"""Find out at once whether the Hub can be reached; the libraries that download from it retry for half a minute."""

import socket
import threading
from queue import Empty, SimpleQueue
from urllib.parse import urlsplit
from urllib.request import getproxies

PATIENCE = 3.0  # seconds in which a host must accept or refuse a connection
PORTS = {"http": 80, "https": 443}


def unreachable() -> str | None:
    """Return why the Hub cannot be reached, or None if it may be. Behind a proxy only a download shows that."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE=1 forbids downloads"
    endpoint = urlsplit(constants.ENDPOINT)  # HF_ENDPOINT, or the Hub
    if endpoint.hostname is None or getproxies().keys() & {"http", "https", "all"}:
        return None
    problem = try_connection(endpoint.hostname, endpoint.port or PORTS.get(endpoint.scheme, 443))
    return problem and f"{constants.ENDPOINT} could not be reached ({problem})"


def try_connection(host: str, port: int) -> str | None:
    """Connect to a host and return what went wrong, or None.

    A thread does it, since resolving a name has no time limit and a host may have many addresses.
    """
    outcome: SimpleQueue[str | None] = SimpleQueue()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=PATIENCE).close()
        except (OSError, UnicodeError) as error:
            outcome.put(getattr(error, "strerror", None) or str(error) or type(error).__name__)
        else:
            outcome.put(None)

    threading.Thread(target=connect, daemon=True).start()
    try:
        return outcome.get(timeout=PATIENCE)
    except Empty:
        return f"no answer in {PATIENCE:g} s"
