"""Training recipes: each a published run, with its number and the source of each setting.

The settings are data, in `published`. All recipes take the list they name, as it is published or
as any table (--sources.lists; docs/sources.md), run in --train.num-ranks processes, and deviate
from the released code where docs/training.md says so (pixels normalized as CLIP's, one shared bank
that starts empty, words replaced with --train.wordnet alone) and in what local batch norm sees:
512 rows in 8 processes, 128 as published.
"Not found" and "no result published" mean that; nothing is from memory.
"""

from collections.abc import Callable

from pipelines.conceptual_recipes import CONCEPTUAL_RECIPES
from pipelines.pipeline import Pipeline
from pipelines.published import training_pipeline


def yfcc15m_v2_clip_vit_b_32(root: str) -> Pipeline:
    """CLIP ViT-B/32 on YFCC15M V2, CLIP-Benchmark's row.

    Command: declip run yfcc15m-v2-clip-vit-b-32 --sources.lists FILE
    Published: 32.8 (ImageNet zero-shot top-1); README of Sense-GVT/DeCLIP (CLIP-Benchmark,
    arXiv 2203.05796).
    Settings: released configuration of CLIP on YFCC15M V2: AdamW (0.9, 0.98, 1e-8), rate
    1e-4 to 1e-3 in 2,500 steps, then a cosine to 0, decay 0.1, 128,001 steps, batch 4,096,
    fp32, log scale at least 3, patch convolution frozen, light crops (0.5 to 1).
    Expect: ingest of 15,388,848 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("yfcc15m-v2-clip-vit-b-32", root)


def yfcc15m_v2_slip_vit_b_32(root: str) -> Pipeline:
    """SLIP ViT-B/32 on YFCC15M V2, CLIP-Benchmark's row.

    Command: declip run yfcc15m-v2-slip-vit-b-32 --sources.lists FILE
    Published: 34.3 (ImageNet zero-shot top-1); README of Sense-GVT/DeCLIP (CLIP-Benchmark,
    arXiv 2203.05796).
    Settings: released configuration of SLIP on YFCC15M V2: AdamW (0.9, 0.98, 1e-8), rate
    1e-4 to 5e-4 in 2,500 steps, then a cosine to 0, decay 0.5, 128,001 steps, batch 4,096,
    fp32, log scale at least 3, patch convolution frozen, batch norm local, a light crop for
    CLIP, two MoCo v2 views for SimCLR at temperature 0.1, log scale to 6.
    Expect: ingest of 15,388,848 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("yfcc15m-v2-slip-vit-b-32", root)


def yfcc15m_v2_filip_vit_b_32(root: str) -> Pipeline:
    """FILIP ViT-B/32 on YFCC15M V2, CLIP-Benchmark's row.

    Command: declip run yfcc15m-v2-filip-vit-b-32 --sources.lists FILE
    Published: 39.5 (ImageNet zero-shot top-1); README of Sense-GVT/DeCLIP (CLIP-Benchmark,
    arXiv 2203.05796).
    Settings: released configuration of FILIP on YFCC15M V2: AdamW (0.9, 0.98, 1e-8), rate
    1e-4 to 5e-4 in 2,500 steps, then a cosine to 0, decay 0.5, 128,001 steps, batch 4,096,
    fp32, log scale at least 3, patch convolution frozen, one MoCo v2 view, tokens of 256,
    all of them, log scale to 6.
    Deviations: padding is masked and takes no part (released: it does); captions are not
    masked (released: 15 % of tokens).
    Expect: ingest of 15,388,848 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("yfcc15m-v2-filip-vit-b-32", root)


def yfcc15m_v2_declip_vit_b_32(root: str) -> Pipeline:
    """DeCLIP ViT-B/32 on YFCC15M V2, CLIP-Benchmark's row.

    Command: declip run yfcc15m-v2-declip-vit-b-32 --sources.lists FILE
    Published: 43.2 (ImageNet zero-shot top-1); README of Sense-GVT/DeCLIP (CLIP-Benchmark,
    arXiv 2203.05796).
    Settings: released configuration of DeCLIP on YFCC15M V2: AdamW (0.9, 0.98, 1e-8), rate
    1e-4 to 1e-3 in 2,500 steps, then a cosine to 0, decay 0.1, 128,001 steps, batch 4,096,
    fp32, log scale at least 3, patch convolution frozen, batch norm local, two MoCo v2
    views, EDA captions, a bank of 65,536, weights 0.1 a pair and 0.2 a further term.
    Deviations: one bank for all processes spans 8 steps (released: one a process, 256
    steps) and starts empty; words are replaced only with --train.wordnet FOLDER.
    Expect: ingest of 15,388,848 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("yfcc15m-v2-declip-vit-b-32", root)


def yfcc15m_v2_defilip_vit_b_32(root: str) -> Pipeline:
    """DeFILIP ViT-B/32 on YFCC15M V2, CLIP-Benchmark's row.

    Command: declip run yfcc15m-v2-defilip-vit-b-32 --sources.lists FILE
    Published: 45.0 (ImageNet zero-shot top-1); README of Sense-GVT/DeCLIP (CLIP-Benchmark,
    arXiv 2203.05796).
    Settings: released configuration of DeFILIP on YFCC15M V2: AdamW (0.9, 0.98, 1e-8), rate
    1e-4 to 1e-3 in 2,500 steps, then a cosine to 0, decay 0.1, 128,001 steps, batch 4,096,
    fp32, log scale at least 3, patch convolution frozen, batch norm local, two MoCo v2
    views, EDA captions, a bank of 65,536, tokens of 256, all of them, weights 0.1 a pair
    and 0.2 a further term.
    Deviations: one bank for all processes spans 8 steps (released: one a process, 256
    steps) and starts empty; words are replaced only with --train.wordnet FOLDER; padding is
    masked and takes no part (released: it does); the token-wise scale ends at 100 like the
    global one (released: 403).
    Expect: ingest of 15,388,848 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("yfcc15m-v2-defilip-vit-b-32", root)


def yfcc15m_v2_clip_rn50(root: str) -> Pipeline:
    """CLIP ResNet-50 on YFCC15M V2, CLIP-Benchmark's row.

    Command: declip run yfcc15m-v2-clip-rn50 --sources.lists FILE
    Published: 37.2 (ImageNet zero-shot top-1); README of Sense-GVT/DeCLIP (CLIP-Benchmark,
    arXiv 2203.05796).
    Settings: released configuration of CLIP on YFCC15M V2: AdamW (0.9, 0.98, 1e-8), rate
    1e-4 to 1e-3 in 2,500 steps, then a cosine to 0, decay 0.1, 128,001 steps, batch 4,096,
    fp32, log scale at least 3, batch norm local, light crops (0.5 to 1).
    Expect: ingest of 15,388,848 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("yfcc15m-v2-clip-rn50", root)


def yfcc15m_v2_slip_rn50(root: str) -> Pipeline:
    """SLIP ResNet-50 on YFCC15M V2, CLIP-Benchmark's row.

    Command: declip run yfcc15m-v2-slip-rn50 --sources.lists FILE
    Published: 28.5 (ImageNet zero-shot top-1); README of Sense-GVT/DeCLIP (CLIP-Benchmark,
    arXiv 2203.05796), without weights.
    Settings: released configuration of SLIP on YFCC15M V2: AdamW (0.9, 0.98, 1e-8), rate
    1e-4 to 5e-4 in 2,500 steps, then a cosine to 0, decay 0.5, 128,001 steps, batch 4,096,
    fp32, log scale at least 3, batch norm synchronized, a light crop for CLIP, two MoCo v2
    views for SimCLR at temperature 0.1, log scale to 6.
    Deviations: the public code cannot run this configuration's synchronized batch norm, and
    heads are synchronized as well here.
    Expect: ingest of 15,388,848 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("yfcc15m-v2-slip-rn50", root)


def yfcc15m_v2_filip_rn50(root: str) -> Pipeline:
    """FILIP ResNet-50 on YFCC15M V2, CLIP-Benchmark's row.

    Command: declip run yfcc15m-v2-filip-rn50 --sources.lists FILE
    Published: 21.3 (ImageNet zero-shot top-1); README of Sense-GVT/DeCLIP (CLIP-Benchmark,
    arXiv 2203.05796).
    Settings: released configuration of FILIP on YFCC15M V2: AdamW (0.9, 0.98, 1e-8), rate
    1e-4 to 5e-4 in 2,500 steps, then a cosine to 0, decay 0.5, 128,001 steps, batch 4,096,
    fp32, log scale at least 3, batch norm synchronized, one MoCo v2 view, tokens of 256,
    all of them, log scale to 6.
    Deviations: padding is masked and takes no part (released: it does); captions are not
    masked (released: 15 % of tokens); the public code cannot run this configuration's
    synchronized batch norm.
    Expect: ingest of 15,388,848 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("yfcc15m-v2-filip-rn50", root)


def yfcc15m_v2_declip_rn50(root: str) -> Pipeline:
    """DeCLIP ResNet-50 on YFCC15M V2, CLIP-Benchmark's row.

    Command: declip run yfcc15m-v2-declip-rn50 --sources.lists FILE
    Published: 44.4 (ImageNet zero-shot top-1); README of Sense-GVT/DeCLIP (CLIP-Benchmark,
    arXiv 2203.05796).
    Settings: released configuration of DeCLIP on YFCC15M V2: AdamW (0.9, 0.98, 1e-8), rate
    1e-4 to 1e-3 in 2,500 steps, then a cosine to 0, decay 0.1, 128,001 steps, batch 4,096,
    fp32, log scale at least 3, batch norm synchronized, two MoCo v2 views, EDA captions, a
    bank of 65,536, weights 0.1 a pair and 0.2 a further term.
    Deviations: one bank for all processes spans 8 steps (released: one a process, 256
    steps) and starts empty; words are replaced only with --train.wordnet FOLDER; the public
    code cannot run this configuration's synchronized batch norm, and heads are synchronized
    as well here.
    Expect: ingest of 15,388,848 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("yfcc15m-v2-declip-rn50", root)


def yfcc15m_v2_defilip_rn50(root: str) -> Pipeline:
    """DeFILIP ResNet-50 on YFCC15M V2, which CLIP-Benchmark's table leaves empty.

    Command: declip run yfcc15m-v2-defilip-rn50 --sources.lists FILE
    Published: no result published.
    Settings: released configuration of DeFILIP ViT-B/32, for there is none of ResNet-50:
    AdamW (0.9, 0.98, 1e-8), rate 1e-4 to 1e-3 in 2,500 steps, then a cosine to 0, decay
    0.1, 128,001 steps, batch 4,096, fp32, log scale at least 3, batch norm synchronized,
    two MoCo v2 views, EDA captions, a bank of 65,536, tokens of 256, all of them, weights
    0.1 a pair and 0.2 a further term.
    Deviations: one bank for all processes spans 8 steps (released: one a process, 256
    steps) and starts empty; words are replaced only with --train.wordnet FOLDER; padding is
    masked and takes no part (released: it does); the token-wise scale ends at 100 like the
    global one (released: 403); the public code cannot run this configuration's synchronized
    batch norm, and heads are synchronized as well here.
    Expect: ingest of 15,388,848 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("yfcc15m-v2-defilip-rn50", root)


def yfcc15m_v1_clip_vit_b_16(root: str) -> Pipeline:
    """CLIP ViT-B/16 on YFCC15M V1, by SLIP's own recipe.

    Command: declip run yfcc15m-v1-clip-vit-b-16 --sources.lists FILE
    Published: 37.6 (ImageNet zero-shot top-1); README of facebookresearch/SLIP (arXiv
    2112.12750).
    Settings: released code and README of SLIP: AdamW (0.9, 0.98, 1e-8), rate 1e-6 to 5e-4
    in one epoch (3,586 steps of 14,689,580 pairs), then a cosine to 1e-5, decay 0.5 of
    matrices alone, batch 4,096, 25 epochs, log scale 0 to ln 100, light crops (0.5 to 1).
    Deviations: bfloat16 autocast (released: fp16 with a scaled loss); gradients pass the
    gather of CLIP's term (released: they do not); seven prompts gave the published number;
    one caption a pair (released: title or description, drawn each time).
    Expect: ingest of 14,689,580 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("yfcc15m-v1-clip-vit-b-16", root)


def yfcc15m_v1_slip_vit_b_16(root: str) -> Pipeline:
    """SLIP ViT-B/16 on YFCC15M V1, by SLIP's own recipe.

    Command: declip run yfcc15m-v1-slip-vit-b-16 --sources.lists FILE
    Published: 42.8 (ImageNet zero-shot top-1); README of facebookresearch/SLIP (arXiv
    2112.12750).
    Settings: released code and README of SLIP: AdamW (0.9, 0.98, 1e-8), rate 1e-6 to 3e-3
    in one epoch (3,586 steps of 14,689,580 pairs), then a cosine to 1e-5, decay 0.1 of
    matrices alone, batch 4,096, 25 epochs, log scale 0 to ln 100, light crops (0.5 to 1)
    for CLIP, two views of crops from 0.08 for SimCLR at temperature 0.1, batch norm
    synchronized.
    Deviations: bfloat16 autocast (released: fp16 with a scaled loss); gradients pass the
    gather of CLIP's term (released: they do not); seven prompts gave the published number;
    one caption a pair (released: title or description, drawn each time).
    Expect: ingest of 14,689,580 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("yfcc15m-v1-slip-vit-b-16", root)


def yfcc100m_filip_vit_b_32(root: str) -> Pipeline:
    """FILIP ViT-B/32 on YFCC100M (FILIP's choice), by FILIP's own recipe.

    Command: declip run yfcc100m-filip-vit-b-32 --sources.lists FILE
    Published: no result published for this list that was found.
    Settings: FILIP's paper, by a digest, for its base model on YFCC100M: LAMB (0.9, 0.999,
    1e-4), warm-up 3,000 steps, cosine, peak 6e-3 * sqrt(batch / 512) = 0.024, decay 0.03
    without biases, norms, embeddings and temperature, batch 8,192, 30 epochs, tokens of
    256, the best quarter of them.
    Deviations: not found, so chosen here: patch size, first and last rate (0), precision,
    bounds of the scale; MoCo v2 views (paper: AutoAugment) and captions as they are (paper:
    back-translated as well).
    Expect: ingest of about 26,000,000 rows, then train/export, which open_clip loads; our
    number: not run.
    """
    return training_pipeline("yfcc100m-filip-vit-b-32", root)


def declip_88m_declip_rn50(root: str) -> Pipeline:
    """DeCLIP ResNet-50 on DeCLIP's 88M, as far as it was released.

    Command: declip run declip-88m-declip-rn50 --sources.lists FILE
    Published: 62.5 (ImageNet zero-shot top-1); README of Sense-GVT/DeCLIP (DeCLIP, arXiv
    2110.05208).
    Settings: released configuration: SGD with Nesterov momentum 0.9, fp16, rate 1e-3 to
    0.2, cosine, decay 1e-4, 128 samples a GPU, log scale at least 3, weights 0.1 a pair and
    0.2 a further term. Its step count is marked as for testing; 64 GPUs (batch 8,192) and
    450,000 steps are from a run's name in the repository. Warm-up: not found, 2,500 as on
    YFCC15M.
    Deviations: 59 of the 88 million pairs were never released; users of the released
    configuration got 7.264; the scale has no rate of its own (released: 1e-4).
    Expect: ingest of about 88,000,000 rows, then train/export, which open_clip loads; our
    number: not run.
    """
    return training_pipeline("declip-88m-declip-rn50", root)


def declip_88m_declip_vit_b_32(root: str) -> Pipeline:
    """DeCLIP ViT-B/32 on DeCLIP's 88M, as far as it was released.

    Command: declip run declip-88m-declip-vit-b-32 --sources.lists FILE
    Published: 66.2 (ImageNet zero-shot top-1); README of Sense-GVT/DeCLIP (DeCLIP, arXiv
    2110.05208).
    Settings: released configuration: SGD with Nesterov momentum 0.9, fp16, rate 1e-3 to 0.2
    in 5,000 steps, cosine, no decay, 300,001 steps, 64 samples a GPU, log scale at least 3.
    GPUs: not found, 64 as in the name of the ResNet's run, so batch 4,096.
    Deviations: 59 of the 88 million pairs were never released; features of 512 (released:
    3,072); weights 0.1 a pair and 0.2 a further term (released: 0.15 a pair); the scale
    trains (released: at rate 0).
    Expect: ingest of about 88,000,000 rows, then train/export, which open_clip loads; our
    number: not run.
    """
    return training_pipeline("declip-88m-declip-vit-b-32", root)


_RECIPES: tuple[Callable[[str], Pipeline], ...] = (
    yfcc15m_v2_clip_vit_b_32,
    yfcc15m_v2_slip_vit_b_32,
    yfcc15m_v2_filip_vit_b_32,
    yfcc15m_v2_declip_vit_b_32,
    yfcc15m_v2_defilip_vit_b_32,
    yfcc15m_v2_clip_rn50,
    yfcc15m_v2_slip_rn50,
    yfcc15m_v2_filip_rn50,
    yfcc15m_v2_declip_rn50,
    yfcc15m_v2_defilip_rn50,
    yfcc15m_v1_clip_vit_b_16,
    yfcc15m_v1_slip_vit_b_16,
    yfcc100m_filip_vit_b_32,
    declip_88m_declip_rn50,
    declip_88m_declip_vit_b_32,
    *CONCEPTUAL_RECIPES,
)
TRAINING_RECIPES: dict[str, Callable[[str], Pipeline]] = {
    recipe.__name__.replace("_", "-"): recipe for recipe in _RECIPES
}
"""Every training recipe by its name on the command line."""
