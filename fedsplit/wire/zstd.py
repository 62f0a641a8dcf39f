"""Entropy coding of whole frames."""

from __future__ import annotations

from dataclasses import dataclass

from fedsplit.types import FedsplitError, knob

WINDOW_BYTES = 2**27


@dataclass(frozen=True)
class Zstd:
    """The bytes of the whole frame, compressed without loss: header, packed bits and values.

    Paper: RFC 8878 (Zstandard).
    Place: wire, any stream; last, since it works on bytes.
    Off: not named; it changes bytes, never values.
    Deviates: nothing.
    """

    level: int = knob(3, "1 is fastest, 19 smallest", low=1, high=19)

    def pack(self, frame: bytes) -> bytes:
        """The compressed frame."""
        import zstandard

        compressed: bytes = zstandard.ZstdCompressor(level=self.level, write_content_size=True).compress(frame)
        return compressed

    def unpack(self, data: bytes, most_bytes: int) -> bytes:
        """The frame.

        Raises:
            FedsplitError: bytes that are not Zstandard's, or that would be a frame of more than `most_bytes`.
        """
        import zstandard

        try:
            size = zstandard.frame_content_size(data)
            if not 0 <= size <= most_bytes:
                raise FedsplitError(f"Received a frame of {size} bytes, it says, which is not at most {most_bytes}.")
            reader = zstandard.ZstdDecompressor(max_window_size=WINDOW_BYTES)
            frame: bytes = reader.decompress(data, read_across_frames=False, allow_extra_data=False)
        except zstandard.ZstdError as error:
            raise FedsplitError(f"Received bytes that are not zstd's: {error}.") from None
        return frame
