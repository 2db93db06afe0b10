"""The node classes by their ids, which are saved in users' workflows and never change."""

from . import host
from .conversation import (
    MingContinueConversation,
    MingConversationPicture,
    MingConversationTranscript,
    MingLoadConversation,
    MingSaveConversation,
)
from .features import (
    MingFeaturesBatch,
    MingFeaturesCompare,
    MingFeaturesPreview,
    MingFeaturesToLatent,
    MingLoadFeatures,
    MingSaveFeatures,
)
from .images import MingExampleScene, MingImageMetrics
from .inputs import checked
from .instructions import MingInstruction
from .loaders import MingTokLoader, MingUniVisionLoader
from .lora import MingLoraLoader
from .mingtok import MingTokDecode, MingTokEncode, MingTokSemanticFeatures
from .regions import MingRegionMask
from .rounds import MingEdit, MingGenerate, MingUnderstand
from .storyboard import MingConversationStoryboard

host.register_model_folders()
host.follow_page_languages()

DISPLAY_NAMES = {
    MingTokLoader: "Load MingTok",
    MingUniVisionLoader: "Load Ming-UniVision",
    MingLoraLoader: "Ming LoRA",
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
    MingFeaturesBatch: "Ming Features Batch",
    MingRegionMask: "Ming Region Mask",
    MingFeaturesToLatent: "Ming Features to Latent",
    MingSaveFeatures: "Ming Save Features",
    MingLoadFeatures: "Ming Load Features",
    MingSaveConversation: "Ming Save Conversation",
    MingLoadConversation: "Ming Load Conversation",
    MingContinueConversation: "Ming Continue Conversation",
    MingConversationPicture: "Ming Conversation Picture",
    MingConversationTranscript: "Ming Conversation Transcript",
    MingConversationStoryboard: "Ming Conversation Storyboard",
    MingImageMetrics: "Ming Image Metrics",
}

NODE_CLASS_MAPPINGS = {cls.__name__: checked(cls) for cls in DISPLAY_NAMES}
NODE_DISPLAY_NAME_MAPPINGS = {cls.__name__: name for cls, name in DISPLAY_NAMES.items()}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
