"""The other end of `python_peer.rs`: CPython as it is, without a package."""

import json
import os
import statistics
import sys
from multiprocessing.connection import Client

with Client(sys.argv[1], authkey=os.environ["PEER_KEY"].encode()) as peer:
    # Work that the Rust program sends, until it sends an empty message.
    while numbers := peer.recv_bytes():
        numbers = json.loads(numbers)
        peer.send_bytes(json.dumps({"mean": statistics.mean(numbers), "median": statistics.median(numbers)}).encode())
    # And work for the Rust program.
    for limit in 10, 1000, 1_000_000:
        peer.send_bytes(b"%d" % limit)
        print(f"Python heard: {peer.recv_bytes().decode()} primes below {limit}", flush=True)
