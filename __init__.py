"""ComfyUI-Ming-UniVision: understand, draw and edit pictures in one continuous feature space."""

if __package__:  # test runners also import this file by itself
    from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    WEB_DIRECTORY = "./web"

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
