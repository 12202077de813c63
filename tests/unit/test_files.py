import errno
import os
from pathlib import Path

import pytest

from gateway.files import sync_folder


class TestSyncFolder:
    def test_syncs_the_folder_itself(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        synced: list[os.stat_result] = []
        # What is asked of the disk shows in no other way, short of a loss of power.
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd)))
        sync_folder(tmp_path)
        assert [os.path.samestat(each, tmp_path.stat()) for each in synced] == [True]

    def test_leaves_nothing_open_when_the_disk_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        opened: list[int] = []

        def fail(fd: int) -> None:
            opened.append(fd)
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "fsync", fail)  # the error of a dying disk, which no test can have
        with pytest.raises(OSError, match="Input/output error"):
            sync_folder(tmp_path)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(opened[0])

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        with pytest.raises(NotADirectoryError):
            sync_folder(path)
