"""The order of samples with Python's integers, one value at a time."""

WORD = 2**64


def plain_hash(*parts: int) -> int:
    """Mix integers as splitmix64 does."""
    state = 0
    for part in parts:
        state = (state + part + 0x9E3779B97F4A7C15) % WORD
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % WORD
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB % WORD
        state = state ^ (state >> 31)
    return state


def plain_permute(index: int, size: int, key: int) -> int:
    """Encrypt an index with a Feistel cipher until it falls into the range."""
    half = 1
    while 4**half < size:
        half += 1
    while True:
        left, right = index // 2**half, index % 2**half
        for round_number in range(6):
            left, right = right, left ^ plain_hash(key, round_number, right) % 2**half
        index = left * 2**half + right
        if index < size:
            return index


def plain_epoch(num_samples: int, chunk_samples: int, seed: int, source: int, epoch: int) -> list:
    """List an epoch: permuted chunks, and the remainder in a gap between two of them."""
    num_chunks = num_samples // chunk_samples
    key = plain_hash(seed, 1, source, epoch)
    order = [plain_permute(i, num_chunks, key) for i in range(num_chunks)]
    chunks = [list(range(c * chunk_samples, (c + 1) * chunk_samples)) for c in order]
    gap = plain_hash(seed, 4, source, epoch) % (num_chunks + 1)
    chunks.insert(gap, list(range(num_chunks * chunk_samples, num_samples)))
    return [sample for chunk in chunks for sample in chunk]
