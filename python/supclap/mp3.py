"""Frames of MP3, of which the decoder does not tell whether their bit rate varies."""

from __future__ import annotations

# Kilobits a second by index, and samples a second, of MPEG 1 and of MPEG 2 and 2.5, layer III.
RATES_1 = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
RATES_2 = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
SAMPLES = (44_100, 48_000, 32_000)
SLOWER = {3: 1, 2: 2, 0: 4}  # by the version's bits


def frame_at(raw: bytes, at: int) -> tuple[int, int] | None:
    """Returns the bit rate and the bytes of the frame that begins there, if one does."""
    if at + 4 > len(raw) or raw[at] != 0xFF or raw[at + 1] & 0xE6 != 0xE2:
        return None
    version, index, samples = raw[at + 1] >> 3 & 3, raw[at + 2] >> 4, raw[at + 2] >> 2 & 3
    if version not in SLOWER or samples == 3 or not 0 < index < 15:
        return None
    rate = (RATES_1 if version == 3 else RATES_2)[index]
    length = (144 if version == 3 else 72) * 1000 * rate * SLOWER[version] // SAMPLES[samples]
    return rate, length + (raw[at + 2] >> 1 & 1)


def bit_rates(raw: bytes) -> set[int]:
    """Returns the bit rates of the frames that follow one another from the first two on."""
    at = 0
    while at >= 0:
        at = raw.find(b"\xff", at)
        first = frame_at(raw, at) if at >= 0 else None
        if first is not None and frame_at(raw, at + first[1]) is not None:
            break
        at = at + 1 if at >= 0 else -1
    rates: set[int] = set()
    while at >= 0 and (frame := frame_at(raw, at)) is not None:
        rates.add(frame[0])
        at += frame[1]
    return rates
