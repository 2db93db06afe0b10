"""ComfyUI-Ming-UniVision: look at, draw and edit pictures in one continuous feature space."""

if __package__:  # test runners import this file by itself, without its package
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    WEB_DIRECTORY = "./web"

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
