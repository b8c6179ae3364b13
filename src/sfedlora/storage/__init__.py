"""Everything that is written to a run directory, and what is read back from one.

disk      the operations that change a disk, each seen by audit hooks before it happens
files     files and folders that are either whole or not there
content   JSON and safetensors in and out, with errors that name the file
owner     one process at a time in a folder
"""

from sfedlora.storage.content import read_json as read_json
from sfedlora.storage.content import read_record as read_record
from sfedlora.storage.content import read_records as read_records
from sfedlora.storage.content import read_tensors as read_tensors
from sfedlora.storage.content import require_header as require_header
from sfedlora.storage.content import to_json as to_json
from sfedlora.storage.content import to_safetensors as to_safetensors
from sfedlora.storage.disk import remove_tree as remove_tree
from sfedlora.storage.files import add_file as add_file
from sfedlora.storage.files import append_line as append_line
from sfedlora.storage.files import directory_written_whole as directory_written_whole
from sfedlora.storage.files import make_directory as make_directory
from sfedlora.storage.files import remove_directory as remove_directory
from sfedlora.storage.files import remove_file as remove_file
from sfedlora.storage.files import remove_leftovers as remove_leftovers
from sfedlora.storage.files import sync_files as sync_files
from sfedlora.storage.files import write_bytes as write_bytes
from sfedlora.storage.files import write_json as write_json
from sfedlora.storage.files import write_tensors as write_tensors
from sfedlora.storage.files import write_text as write_text
from sfedlora.storage.owner import OWNER_FILE as OWNER_FILE
from sfedlora.storage.owner import owned as owned

__all__ = [
    "OWNER_FILE",
    "add_file",
    "append_line",
    "directory_written_whole",
    "make_directory",
    "owned",
    "read_json",
    "read_record",
    "read_records",
    "read_tensors",
    "remove_directory",
    "remove_file",
    "remove_leftovers",
    "remove_tree",
    "require_header",
    "sync_files",
    "to_json",
    "to_safetensors",
    "write_bytes",
    "write_json",
    "write_tensors",
    "write_text",
]
