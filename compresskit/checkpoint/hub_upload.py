"""Upload a finished folder to the Hub: checked before the work, done after it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from compresskit.checkpoint.hub import LOG_IN
from compresskit.checkpoint.small_files import first_line
from compresskit.errors import NetworkError, RequestError

FLAG = "--push-to-hub"


class Upload(NamedTuple):
    """Where a result goes."""

    name: str
    """OWNER/NAME on the Hub, or NAME for the user's own."""
    private: bool
    """Whether a repository that is made for it is private."""

    def check(self) -> None:
        """Raise RequestError if the name is none, there is no token, or the Hub is not to be asked; asks nobody."""
        from huggingface_hub import constants, get_token
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.name)
        except HFValidationError as error:
            raise RequestError(f"{FLAG} {self.name}: is no name of a repository; write OWNER/NAME") from error
        if constants.is_offline_mode():
            raise RequestError(f"{FLAG} {self.name}: HF_HUB_OFFLINE is set; unset it, or leave {FLAG} out")
        if get_token() is None:
            raise RequestError(f"{FLAG} {self.name}: there is no token of the Hub; {LOG_IN}")

    def upload(self, folder: Path, message: str) -> str:
        """Upload all files of a folder in one commit; the repository is made if there is none.

        Returns:
            The address of the commit.

        Raises:
            NetworkError: the Hub refused it, or cannot be reached; the folder is whole all the same.
        """
        from huggingface_hub import HfApi

        hub = HfApi()
        try:
            made = hub.create_repo(self.name, private=self.private or None, exist_ok=True)
            commit = hub.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=message)
        except (OSError, ValueError, RuntimeError) as error:
            again = f"hf upload {self.name} {folder}"
            raise NetworkError(f"{FLAG} {self.name}: {first_line(error)}; {folder} is whole, to try again: {again}") from error
        return str(commit.commit_url)
