"""Read files that users name in settings, with one sentence for whatever can be wrong with them."""

import fsspec

from declip_shards import DeclipError


def read_user_file(setting: str, path: str, max_bytes: int | None = None) -> bytes:
    """A file's bytes.

    Args:
        setting: which setting names it, for the error.
        path: local, or any fsspec URL.
        max_bytes: most bytes that are read; a longer file gives one more than that.

    Raises:
        DeclipError: it does not exist, is a folder, may not be read, or is of an unknown kind.
    """
    try:
        with fsspec.open(path, "rb") as f:
            data: bytes = f.read() if max_bytes is None else f.read(max_bytes + 1)
    except FileNotFoundError as error:
        raise DeclipError(f"{setting} {path!r} does not exist; correct its path.") from error
    except IsADirectoryError as error:
        raise DeclipError(f"{setting} {path!r} is a folder; name a file in it.") from error
    except OSError as error:
        reason = error.strerror or error
        raise DeclipError(
            f"{setting} {path!r} cannot be read ({reason}); correct its path, or make it readable."
        ) from error
    except (ValueError, ImportError) as error:
        raise DeclipError(
            f"{setting} {path!r} is of a kind that fsspec cannot open here ({error}); copy the "
            "file to this machine, or install the package that serves it."
        ) from error
    return data
