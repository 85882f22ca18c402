"""Four processes take work from a queue until they get "STOP". `task_queue.rs` is its port."""

import time
from multiprocessing import Process, Queue, current_process


def mul(a, b):
    time.sleep(0.03)
    return a * b


def plus(a, b):
    time.sleep(0.03)
    return a + b


def worker(tasks, done):
    for function, args in iter(tasks.get, "STOP"):
        done.put(f"{current_process().name} says that {function.__name__}{args} = {function(*args)}")


if __name__ == "__main__":
    tasks, done = Queue(), Queue()
    todo = [(mul, (i, 7)) for i in range(20)] + [(plus, (i, 8)) for i in range(10)]
    for task in todo:
        tasks.put(task)
    for n in range(4):
        Process(target=worker, args=(tasks, done)).start()
    for _ in todo:
        print(done.get())
    for n in range(4):
        tasks.put("STOP")
