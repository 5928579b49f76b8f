"""What a download costs: an artifact's files, compressed with Zstandard."""

from squeeze.artifact import Artifact

LEVEL, PIECE = 3, 64 << 20
"""zstd's own default level; pieces keep memory bounded and cost less than a thousandth."""


def compressed_bytes(artifact: Artifact) -> int:
    """Bytes of all files of an artifact, each compressed in pieces of 64 MB at level 3. pyarrow, which reads the data, has zstd."""
    import pyarrow

    codec = pyarrow.Codec("zstd", compression_level=LEVEL)
    root = artifact.folder.parent if artifact.folder.is_file() else artifact.folder
    total = 0
    for name in artifact.manifest.files:
        with (root / name).open("rb") as file:
            while piece := file.read(PIECE):
                total += min(len(piece), len(codec.compress(piece, asbytes=True)))
    return total
