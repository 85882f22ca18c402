"""One end of a connection in CPython, any version: `listen` echoes, `connect` has messages echoed.

peer.py listen ADDRESS KEY    accepts until one peer has the key; prints the address, then how each accept went
peer.py connect ADDRESS KEY   prints `echoed` if every message came back
peer.py send ADDRESS KEY      sends `hello` by send_bytes, and leaves

ADDRESS: host:port, a path, or @abstract; KEY in hexadecimal, or - for none.
"""

import binascii
import sys
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Listener

SIZES = [0, 1, 16384, 16385, 100000, 1 << 20, 5]


def parse(text):
    if text.startswith("@"):
        return "AF_UNIX", "\0" + text[1:]
    if "/" in text:
        return "AF_UNIX", text
    host, port = text.rsplit(":", 1)
    return "AF_INET6" if "[" in host else "AF_INET", (host.strip("[]"), int(port))


def say(text):
    print(text)
    sys.stdout.flush()


def listen(family, address, key):
    listener = Listener(address, family, authkey=key)
    say("%s:%s" % listener.address[:2] if family != "AF_UNIX" else "bound")
    while True:
        try:
            connection = listener.accept()
            break
        except AuthenticationError as error:
            say("AuthenticationError: %s" % error)
    say("accepted")
    try:
        while True:
            connection.send_bytes(connection.recv_bytes())
    except EOFError:
        say("closed")
    try:
        listener.close()
    except (TypeError, ValueError):
        pass  # Old ones want to remove an abstract name, which is no file


def connect(family, address, key):
    connection = Client(address, authkey=key)
    for size in SIZES:
        message = bytes(bytearray(i % 251 for i in range(size)))
        connection.send_bytes(message)
        assert connection.recv_bytes() == message, size
    connection.close()
    say("echoed")


def send(family, address, key):
    connection = Client(address, authkey=key)
    connection.send_bytes(b"hello")
    connection.close()


if __name__ == "__main__":
    role, address, key = sys.argv[1:]
    family, address = parse(address)
    try:
        {"listen": listen, "connect": connect, "send": send}[role](
            family, address, None if key == "-" else binascii.unhexlify(key)
        )
    except (AuthenticationError, EOFError) as error:
        say("%s: %s" % (type(error).__name__, error))
        sys.exit(3)
