"""Data files named by an http(s) address, brought to this machine once and read as local files from then on.

The transfer and the cache are the `datasets` library's (an optional package, imported only when an address is used). It reaches http
through fsspec, which needs aiohttp; `datasets` itself no longer brings that along. The cache is keyed by address and ETag: from a server
that sends no ETag, the first download is used until its cached copy is deleted.
"""

from pathlib import Path
from urllib.parse import urlsplit

from user_error import UserError


def is_url(path: str) -> bool:
    """Whether a data path is an http(s) address rather than a local file."""
    return path.lower().startswith(("http://", "https://"))


def file_name_of(path: str) -> str:
    """The part of a path or address whose ending says the format: query and fragment of an address do not count."""
    return urlsplit(path).path if is_url(path) else path


def download(url: str) -> Path:
    """The local copy of the file at this address, downloaded if the cache does not hold it; UserError if that fails."""
    try:
        from datasets import DownloadManager

        return Path(DownloadManager().download(url))
    except ImportError as error:
        raise UserError(
            f"Data files named by an address need the packages datasets and aiohttp; {url} met: {error}. "
            "Run `pip install datasets aiohttp`, or download the file by other means and give its local path."
        ) from error
    except Exception as error:  # what can fail is the network's, the server's and the disk's, each with exception types of its own
        raise UserError(
            f"A data file named by an address must be downloadable from this machine; {url} failed with "
            f"{type(error).__name__}: {error}. Correct the address, or download the file by other means and give its local path."
        ) from error
