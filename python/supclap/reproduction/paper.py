"""Numbers of the paper that tables of a reproduction stand beside, in percent (arXiv 2509.21033).

Its corpora are recordings (AudioCaps, Clotho) and its models large: levels are not comparable with
those of a synthetic corpus, differences between losses may be.
"""

Row = tuple[float | None, ...]

ABLATION: dict[str, Row] = {  # AudioCaps: R@1, R@10, mAP@10 of text to audio, of audio to text
    "InfoNCE": (41.87, 87.69, 56.74, 56.72, 92.33, 35.36),
    "uni-StaticSVR": (43.28, None, 57.95, 57.56, None, 34.62),
    "bi-StaticSVR": (43.89, 88.78, 58.36, 57.77, 92.75, 35.72),
    "uni-DynamicSVR": (43.63, None, 58.16, 58.51, None, 36.00),
    "uni-DynamicSVR, no constraint": (43.53, None, None, 57.67, None, None),
    "bi-DynamicSVR": (44.16, 89.24, 58.79, 59.66, 93.49, 36.69),
    "bi-DynamicSVR, no constraint": (44.01, None, 58.47, 59.24, None, 36.64),
    "SigLIP": (36.74, 85.71, None, 48.00, 88.03, None),
    "SigLIP bi-StaticSVR": (42.54, 87.61, None, 55.25, 90.55, None),
    "SigLIP bi-DynamicSVR": (43.09, 89.26, None, 56.30, 92.67, None),
}
MULTILINGUAL: dict[str, Row] = {  # AudioCaps, R@1, mean of eight languages: each direction
    "InfoNCE": (37.20, 50.20),
    "bi-StaticSVR": (39.60, 52.36),
    "bi-DynamicSVR": (39.75, 53.99),
}
CROSS: dict[str, Row] = {  # R@1 of each direction: AudioCaps -> Clotho, Clotho -> AudioCaps
    "InfoNCE": (14.45, 18.16, 20.65, 26.68),
    "bi-StaticSVR": (14.82, 19.42, 21.09, 28.36),
    "bi-DynamicSVR": (14.93, 20.19, 21.37, 29.62),
}
ZERO_SHOT: dict[str, Row] = {  # ESC-50, UrbanSound8K, VGGSound
    "InfoNCE": (89.6, 81.63, 24.57),
    "bi-StaticSVR": (90.7, 83.63, 24.65),
    "bi-DynamicSVR": (92.1, 83.74, 25.11),
}
COST: dict[str, Row] = {  # AudioCaps: seconds of an epoch over InfoNCE's 247.9; peak MB
    "InfoNCE": (1.0, 22724.0),
    "bi-StaticSVR": (243.8 / 247.9, 22732.0),
    "bi-DynamicSVR": (251.9 / 247.9, 22834.0),
}
