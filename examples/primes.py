"""Which of these numbers are primes, each as soon as it is known. `primes.rs` is its port."""

from math import isqrt
from multiprocessing import Pool

NUMBERS = [999_999_999_989, 1_000_000_000_001, 1_000_000_000_039, 1_000_001_970_001, 1_000_000_000_061, 42]


def is_prime(n):
    return n, all(n % divisor for divisor in range(2, isqrt(n) + 1))


if __name__ == "__main__":
    with Pool(4) as pool:
        for n, prime in pool.imap_unordered(is_prime, NUMBERS):
            print(f"{n} is {'a' if prime else 'no'} prime")
