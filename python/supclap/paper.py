"""Numbers of the paper that tables of a reproduction stand beside, in percent (arXiv 2509.21033).

Its corpora are recordings (AudioCaps, Clotho) and its models large: levels are not comparable with
those of a synthetic corpus, differences between losses may be.
"""

ABLATION = {  # AudioCaps: text to audio R@1, mAP@10; audio to text R@1, mAP@10
    "InfoNCE": (41.87, 56.74, 56.72, 35.36),
    "uni-StaticSVR": (43.28, 57.95, 57.56, 34.62),
    "bi-StaticSVR": (43.89, 58.36, 57.77, 35.72),
    "uni-DynamicSVR": (43.63, 58.16, 58.51, 36.00),
    "uni-DynamicSVR, no constraint": (43.53, None, 57.67, None),
    "bi-DynamicSVR": (44.16, 58.79, 59.66, 36.69),
    "bi-DynamicSVR, no constraint": (44.01, 58.47, 59.24, 36.64),
    "SigLIP": (36.74, None, 48.00, None),
    "SigLIP bi-StaticSVR": (42.54, None, 55.25, None),
    "SigLIP bi-DynamicSVR": (43.09, None, 56.30, None),
}
MULTILINGUAL = {  # AudioCaps, mean R@1 of eight languages: text to audio, audio to text
    "InfoNCE": (37.20, 50.20),
    "bi-StaticSVR": (39.60, 52.36),
    "bi-DynamicSVR": (39.75, 53.99),
}
CROSS = {  # R@1, text to audio and audio to text: AudioCaps -> Clotho, Clotho -> AudioCaps
    "InfoNCE": (14.45, 18.16, 20.65, 26.68),
    "bi-StaticSVR": (14.82, 19.42, 21.09, 28.36),
    "bi-DynamicSVR": (14.93, 20.19, 21.37, 29.62),
}
ZERO_SHOT = {"InfoNCE": 89.6, "bi-StaticSVR": 90.7, "bi-DynamicSVR": 92.1}  # ESC-50
EPOCH_SECONDS = {"InfoNCE": 247.9, "bi-StaticSVR": 243.8, "bi-DynamicSVR": 251.9}  # AudioCaps
