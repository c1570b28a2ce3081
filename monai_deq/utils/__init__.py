# SPDX-License-Identifier: Apache-2.0
"""What several packages use: files, processes, settings of the command line."""

from __future__ import annotations

from .errors import PairsFailedError, check_on_error, failure_reason, root_error
from .files import (
    check_writable,
    expand_user,
    json_ready,
    lock_folder,
    read_json,
    refuse_existing,
    replace_file,
    unlock_folder,
    write_json,
)
from .processes import (
    check_device,
    end_processes,
    gather_items,
    gather_to_first,
    init_processes,
    local_device,
    mean_over_processes,
    process_count,
    process_rank,
    wait_for_all,
)
from .settings import as_flag, refuse_other_settings, refuse_unknown_settings

__all__ = [
    "PairsFailedError",
    "as_flag",
    "check_device",
    "check_on_error",
    "check_writable",
    "end_processes",
    "expand_user",
    "failure_reason",
    "gather_items",
    "gather_to_first",
    "init_processes",
    "json_ready",
    "local_device",
    "lock_folder",
    "mean_over_processes",
    "process_count",
    "process_rank",
    "read_json",
    "refuse_existing",
    "refuse_other_settings",
    "refuse_unknown_settings",
    "replace_file",
    "root_error",
    "unlock_folder",
    "wait_for_all",
    "write_json",
]
