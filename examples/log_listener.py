"""Many processes log, and one writes all of it to a file. `log_listener.rs` is its port."""

import logging
import logging.handlers
import sys
import time
from multiprocessing import Process, Queue


def listener(records, path):
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(processName)s %(levelname)s %(message)s"))
    for record in iter(records.get, None):
        handler.handle(record)


def worker(records):
    logger = logging.getLogger()
    logger.addHandler(logging.handlers.QueueHandler(records))
    logger.setLevel(logging.INFO)
    for n in range(20):
        time.sleep(0.005)
        logger.log([logging.INFO, logging.WARNING, logging.ERROR][n % 3], "message %d", n)


if __name__ == "__main__":
    records = Queue()
    listening = Process(target=listener, args=(records, sys.argv[1]))
    listening.start()
    workers = [Process(target=worker, args=(records,), name=f"worker-{n}") for n in range(4)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    records.put(None)
    listening.join()
