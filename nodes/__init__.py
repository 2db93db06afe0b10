"""The node classes, by the ids that saved workflows know them by."""

from . import host
from .conversation import (
    MingConversationPicture,
    MingConversationTranscript,
    MingEdit,
    MingGenerate,
    MingLoadConversation,
    MingSaveConversation,
    MingUnderstand,
)
from .features import (
    MingFeaturesCompare,
    MingFeaturesPreview,
    MingFeaturesToLatent,
    MingLoadFeatures,
    MingSaveFeatures,
)
from .instructions import MingInstruction
from .loaders import MingTokLoader, MingUniVisionLoader
from .mingtok import MingTokDecode, MingTokEncode, MingTokSemanticFeatures
from .pictures import MingExampleScene, MingImageMetrics

host.register_model_folder()

NAMES = {
    MingTokLoader: "Load MingTok",
    MingUniVisionLoader: "Load Ming-UniVision",
    MingExampleScene: "Ming Example Scene",
    MingTokEncode: "MingTok Encode",
    MingTokSemanticFeatures: "MingTok Semantic Features",
    MingTokDecode: "MingTok Decode",
    MingUnderstand: "Ming Understand",
    MingGenerate: "Ming Generate",
    MingEdit: "Ming Edit",
    MingInstruction: "Ming Instruction",
    MingFeaturesPreview: "Ming Features Preview",
    MingFeaturesCompare: "Ming Features Compare",
    MingFeaturesToLatent: "Ming Features to Latent",
    MingSaveFeatures: "Ming Save Features",
    MingLoadFeatures: "Ming Load Features",
    MingSaveConversation: "Ming Save Conversation",
    MingLoadConversation: "Ming Load Conversation",
    MingConversationPicture: "Ming Conversation Picture",
    MingConversationTranscript: "Ming Conversation Transcript",
    MingImageMetrics: "Ming Image Metrics",
}

NODE_CLASS_MAPPINGS = {cls.__name__: cls for cls in NAMES}
NODE_DISPLAY_NAME_MAPPINGS = {cls.__name__: name for cls, name in NAMES.items()}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
