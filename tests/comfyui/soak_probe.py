"""A custom node file without nodes: it tells what the process of a server holds, and can switch the prefix cache off.

`soak.py` copies it into the custom_nodes folder of the server that it starts.
"""

import contextlib
import ctypes
import gc
import sys
import tempfile
from collections import Counter
from xml.etree import ElementTree

import psutil
import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict = {}
OURS = ("UniVision", "MingTok", "Engine", "Features", "Conversation")
MB = 1 << 20


@PromptServer.instance.routes.get("/soak/state")
async def state(request: web.Request) -> web.Response:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc only: RSS then has no freed memory
        ctypes.CDLL(None).malloc_trim(0)
    process = psutil.Process()
    found = {
        "rss_mb": process.memory_info().rss / MB,
        "allocated_mb": allocated_bytes() / MB,
        "tensors_mb": tensor_bytes() / MB,
        "threads": process.num_threads(),
        "files": len(process.open_files()),
        "live": live_objects(),
    }
    return web.json_response(found)


@PromptServer.instance.routes.post("/soak/without_prefix_cache")
async def without_prefix_cache(request: web.Request) -> web.Response:
    """From now on nothing is remembered, so that every round is computed in the same steps whatever ran before."""
    (module,) = (module for name, module in sys.modules.items() if name.endswith(".ming_core.prefix_cache"))
    module.PrefixCache.store = lambda self, keys, entries: None
    return web.Response()


def live_objects() -> dict[str, int]:
    """How many objects of each class in OURS are alive."""
    classes = (type(thing) for thing in gc.get_objects())
    counts = Counter(c.__name__ for c in classes if c.__name__ in OURS and ".ming_core." in c.__module__)
    return {name: counts[name] for name in OURS}


def allocated_bytes() -> int:
    """Bytes that are in use in all heaps of the C library: RSS without what is free but in pieces. 0 where unknown."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_info"):
        return 0
    libc.fopen.restype = ctypes.c_void_p
    with tempfile.NamedTemporaryFile("r", suffix=".xml") as file:
        stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        whole = ElementTree.parse(file.name).getroot()
    sizes = {total.get("type"): int(total.get("size")) for total in whole.findall("total")}
    return int(whole.find("system[@type='current']").get("size")) + sizes["mmap"] - sizes["fast"] - sizes["rest"]


def tensor_bytes() -> int:
    """Bytes of all storages that tensors keep alive."""
    tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))
    return sum({s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())
