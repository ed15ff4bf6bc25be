"""Training recipes on CC3M and CC12M; `published` holds the settings, this file their sources."""

from pipelines.pipeline import Pipeline
from pipelines.published import training_pipeline


def cc3m_clip_vit_b_32(root: str) -> Pipeline:
    """CLIP ViT-B/32 on CC3M, with CLIP-Benchmark's settings.

    Command: declip run cc3m-clip-vit-b-32 --sources.lists FILE
    Published: no result published for this list and tower.
    Settings: released configuration of CLIP on YFCC15M V2 (for this list there is none), 32
    epochs: AdamW (0.9, 0.98, 1e-8), rate 1e-4 to 1e-3 in 2,500 steps, then a cosine to 0,
    decay 0.1, batch 4,096, fp32, log scale at least 3, patch convolution frozen, light
    crops (0.5 to 1).
    Expect: ingest of 3,318,333 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("cc3m-clip-vit-b-32", root)


def cc3m_slip_vit_b_32(root: str) -> Pipeline:
    """SLIP ViT-B/32 on CC3M, with CLIP-Benchmark's settings.

    Command: declip run cc3m-slip-vit-b-32 --sources.lists FILE
    Published: no result published for this list and tower.
    Settings: released configuration of SLIP on YFCC15M V2 (for this list there is none), 32
    epochs: AdamW (0.9, 0.98, 1e-8), rate 1e-4 to 5e-4 in 2,500 steps, then a cosine to 0,
    decay 0.5, batch 4,096, fp32, log scale at least 3, patch convolution frozen, batch norm
    local, a light crop for CLIP, two MoCo v2 views for SimCLR at temperature 0.1, log scale
    to 6.
    Expect: ingest of 3,318,333 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("cc3m-slip-vit-b-32", root)


def cc3m_filip_vit_b_32(root: str) -> Pipeline:
    """FILIP ViT-B/32 on CC3M, with CLIP-Benchmark's settings.

    Command: declip run cc3m-filip-vit-b-32 --sources.lists FILE
    Published: no result published for this list and tower.
    Settings: released configuration of FILIP on YFCC15M V2 (for this list there is none),
    32 epochs: AdamW (0.9, 0.98, 1e-8), rate 1e-4 to 5e-4 in 2,500 steps, then a cosine to
    0, decay 0.5, batch 4,096, fp32, log scale at least 3, patch convolution frozen, one
    MoCo v2 view, tokens of 256, all of them, log scale to 6.
    Deviations: padding is masked and takes no part (released: it does); captions are not
    masked (released: 15 % of tokens).
    Expect: ingest of 3,318,333 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("cc3m-filip-vit-b-32", root)


def cc3m_declip_vit_b_32(root: str) -> Pipeline:
    """DeCLIP ViT-B/32 on CC3M, with CLIP-Benchmark's settings.

    Command: declip run cc3m-declip-vit-b-32 --sources.lists FILE
    Published: no result published for this list and tower.
    Settings: released configuration of DeCLIP on YFCC15M V2 (for this list there is none),
    32 epochs: AdamW (0.9, 0.98, 1e-8), rate 1e-4 to 1e-3 in 2,500 steps, then a cosine to
    0, decay 0.1, batch 4,096, fp32, log scale at least 3, patch convolution frozen, batch
    norm local, two MoCo v2 views, EDA captions, a bank of 65,536, weights 0.1 a pair and
    0.2 a further term.
    Deviations: one bank for all processes spans 8 steps (released: one a process, 256
    steps) and starts empty; words are replaced only with --train.wordnet FOLDER.
    Expect: ingest of 3,318,333 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("cc3m-declip-vit-b-32", root)


def cc3m_defilip_vit_b_32(root: str) -> Pipeline:
    """DeFILIP ViT-B/32 on CC3M, with CLIP-Benchmark's settings.

    Command: declip run cc3m-defilip-vit-b-32 --sources.lists FILE
    Published: no result published for this list and tower.
    Settings: released configuration of DeFILIP on YFCC15M V2 (for this list there is none),
    32 epochs: AdamW (0.9, 0.98, 1e-8), rate 1e-4 to 1e-3 in 2,500 steps, then a cosine to
    0, decay 0.1, batch 4,096, fp32, log scale at least 3, patch convolution frozen, batch
    norm local, two MoCo v2 views, EDA captions, a bank of 65,536, tokens of 256, all of
    them, weights 0.1 a pair and 0.2 a further term.
    Deviations: one bank for all processes spans 8 steps (released: one a process, 256
    steps) and starts empty; words are replaced only with --train.wordnet FOLDER; padding is
    masked and takes no part (released: it does); the token-wise scale ends at 100 like the
    global one (released: 403).
    Expect: ingest of 3,318,333 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("cc3m-defilip-vit-b-32", root)


def cc3m_clip_rn50(root: str) -> Pipeline:
    """CLIP ResNet-50 on CC3M, a row of DeCLIP's ablation.

    Command: declip run cc3m-clip-rn50 --sources.lists FILE
    Published: 20.6 (ImageNet zero-shot top-1); ablation of DeCLIP (arXiv 2110.05208), by a
    digest of its source.
    Settings: 32 epochs, as DeCLIP's row has by a digest of its paper (CLIP's own: not
    found); the rest is the released configuration of CLIP on YFCC15M V2: AdamW (0.9, 0.98,
    1e-8), rate 1e-4 to 1e-3 in 2,500 steps, then a cosine to 0, decay 0.1, batch 4,096,
    fp32, log scale at least 3, batch norm local, light crops (0.5 to 1).
    Expect: ingest of 3,318,333 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("cc3m-clip-rn50", root)


def cc3m_declip_rn50(root: str) -> Pipeline:
    """DeCLIP ResNet-50 on CC3M, a row of DeCLIP's ablation.

    Command: declip run cc3m-declip-rn50 --sources.lists FILE
    Published: 27.2 (ImageNet zero-shot top-1); ablation of DeCLIP (arXiv 2110.05208), by a
    digest of its source.
    Settings: epochs (32, by the paper) and weights (0.4 and 0.2) by a digest of DeCLIP's
    paper; the rest is not found and is the released configuration of DeCLIP on YFCC15M V2:
    AdamW (0.9, 0.98, 1e-8), rate 1e-4 to 1e-3 in 2,500 steps, then a cosine to 0, decay
    0.1, batch 4,096, fp32, log scale at least 3, batch norm synchronized, two MoCo v2
    views, EDA captions, a bank of 65,536.
    Deviations: one bank for all processes spans 8 steps (released: one a process, 256
    steps) and starts empty; words are replaced only with --train.wordnet FOLDER.
    Expect: ingest of 3,318,333 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("cc3m-declip-rn50", root)


def cc3m_clip_vit_b_16(root: str) -> Pipeline:
    """CLIP ViT-B/16 on CC3M, by SLIP's own recipe.

    Command: declip run cc3m-clip-vit-b-16 --sources.lists FILE
    Published: 17.1 (ImageNet zero-shot top-1); README of facebookresearch/SLIP (arXiv
    2112.12750).
    Settings: released code and README of SLIP: AdamW (0.9, 0.98, 1e-8), rate 1e-6 to 5e-4
    in one epoch (810 steps of 3,318,333 pairs), then a cosine to 1e-5, decay 0.5 of
    matrices alone, batch 4,096, 40 epochs, log scale 0 to ln 100, light crops (0.5 to 1).
    Deviations: bfloat16 autocast (released: fp16 with a scaled loss); gradients pass the
    gather of CLIP's term (released: they do not); seven prompts gave the published number;
    users of the released code reached 14.1 for CLIP and 18.4 for SLIP.
    Expect: ingest of 3,318,333 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("cc3m-clip-vit-b-16", root)


def cc3m_slip_vit_b_16(root: str) -> Pipeline:
    """SLIP ViT-B/16 on CC3M, by SLIP's own recipe.

    Command: declip run cc3m-slip-vit-b-16 --sources.lists FILE
    Published: 23.0 (ImageNet zero-shot top-1); README of facebookresearch/SLIP (arXiv
    2112.12750).
    Settings: released code and README of SLIP: AdamW (0.9, 0.98, 1e-8), rate 1e-6 to 3e-3
    in one epoch (810 steps of 3,318,333 pairs), then a cosine to 1e-5, decay 0.1 of
    matrices alone, batch 4,096, 40 epochs, log scale 0 to ln 100, light crops (0.5 to 1)
    for CLIP, two views of crops from 0.08 for SimCLR at temperature 0.1, batch norm
    synchronized.
    Deviations: bfloat16 autocast (released: fp16 with a scaled loss); gradients pass the
    gather of CLIP's term (released: they do not); seven prompts gave the published number;
    users of the released code reached 14.1 for CLIP and 18.4 for SLIP.
    Expect: ingest of 3,318,333 rows, then train/export, which open_clip loads; our number:
    not run.
    """
    return training_pipeline("cc3m-slip-vit-b-16", root)


def cc12m_clip_vit_b_32(root: str) -> Pipeline:
    """CLIP ViT-B/32 on CC12M, with CLIP-Benchmark's settings.

    Command: declip run cc12m-clip-vit-b-32 --sources.lists FILE
    Published: no result published for this list and tower.
    Settings: released configuration of CLIP on YFCC15M V2 (for this list there is none), 32
    epochs: AdamW (0.9, 0.98, 1e-8), rate 1e-4 to 1e-3 in 2,500 steps, then a cosine to 0,
    decay 0.1, batch 4,096, fp32, log scale at least 3, patch convolution frozen, light
    crops (0.5 to 1).
    Expect: ingest of about 12,000,000 rows, then train/export, which open_clip loads; our
    number: not run.
    """
    return training_pipeline("cc12m-clip-vit-b-32", root)


def cc12m_slip_vit_b_32(root: str) -> Pipeline:
    """SLIP ViT-B/32 on CC12M, with CLIP-Benchmark's settings.

    Command: declip run cc12m-slip-vit-b-32 --sources.lists FILE
    Published: no result published for this list and tower.
    Settings: released configuration of SLIP on YFCC15M V2 (for this list there is none), 32
    epochs: AdamW (0.9, 0.98, 1e-8), rate 1e-4 to 5e-4 in 2,500 steps, then a cosine to 0,
    decay 0.5, batch 4,096, fp32, log scale at least 3, patch convolution frozen, batch norm
    local, a light crop for CLIP, two MoCo v2 views for SimCLR at temperature 0.1, log scale
    to 6.
    Expect: ingest of about 12,000,000 rows, then train/export, which open_clip loads; our
    number: not run.
    """
    return training_pipeline("cc12m-slip-vit-b-32", root)


def cc12m_filip_vit_b_32(root: str) -> Pipeline:
    """FILIP ViT-B/32 on CC12M, with CLIP-Benchmark's settings.

    Command: declip run cc12m-filip-vit-b-32 --sources.lists FILE
    Published: no result published for this list and tower.
    Settings: released configuration of FILIP on YFCC15M V2 (for this list there is none),
    32 epochs: AdamW (0.9, 0.98, 1e-8), rate 1e-4 to 5e-4 in 2,500 steps, then a cosine to
    0, decay 0.5, batch 4,096, fp32, log scale at least 3, patch convolution frozen, one
    MoCo v2 view, tokens of 256, all of them, log scale to 6.
    Deviations: padding is masked and takes no part (released: it does); captions are not
    masked (released: 15 % of tokens).
    Expect: ingest of about 12,000,000 rows, then train/export, which open_clip loads; our
    number: not run.
    """
    return training_pipeline("cc12m-filip-vit-b-32", root)


def cc12m_declip_vit_b_32(root: str) -> Pipeline:
    """DeCLIP ViT-B/32 on CC12M, with CLIP-Benchmark's settings.

    Command: declip run cc12m-declip-vit-b-32 --sources.lists FILE
    Published: no result published for this list and tower.
    Settings: released configuration of DeCLIP on YFCC15M V2 (for this list there is none),
    32 epochs: AdamW (0.9, 0.98, 1e-8), rate 1e-4 to 1e-3 in 2,500 steps, then a cosine to
    0, decay 0.1, batch 4,096, fp32, log scale at least 3, patch convolution frozen, batch
    norm local, two MoCo v2 views, EDA captions, a bank of 65,536, weights 0.1 a pair and
    0.2 a further term.
    Deviations: one bank for all processes spans 8 steps (released: one a process, 256
    steps) and starts empty; words are replaced only with --train.wordnet FOLDER.
    Expect: ingest of about 12,000,000 rows, then train/export, which open_clip loads; our
    number: not run.
    """
    return training_pipeline("cc12m-declip-vit-b-32", root)


def cc12m_defilip_vit_b_32(root: str) -> Pipeline:
    """DeFILIP ViT-B/32 on CC12M, with CLIP-Benchmark's settings.

    Command: declip run cc12m-defilip-vit-b-32 --sources.lists FILE
    Published: no result published for this list and tower.
    Settings: released configuration of DeFILIP on YFCC15M V2 (for this list there is none),
    32 epochs: AdamW (0.9, 0.98, 1e-8), rate 1e-4 to 1e-3 in 2,500 steps, then a cosine to
    0, decay 0.1, batch 4,096, fp32, log scale at least 3, patch convolution frozen, batch
    norm local, two MoCo v2 views, EDA captions, a bank of 65,536, tokens of 256, all of
    them, weights 0.1 a pair and 0.2 a further term.
    Deviations: one bank for all processes spans 8 steps (released: one a process, 256
    steps) and starts empty; words are replaced only with --train.wordnet FOLDER; padding is
    masked and takes no part (released: it does); the token-wise scale ends at 100 like the
    global one (released: 403).
    Expect: ingest of about 12,000,000 rows, then train/export, which open_clip loads; our
    number: not run.
    """
    return training_pipeline("cc12m-defilip-vit-b-32", root)


def cc12m_clip_vit_b_16(root: str) -> Pipeline:
    """CLIP ViT-B/16 on CC12M, by SLIP's own recipe.

    Command: declip run cc12m-clip-vit-b-16 --sources.lists FILE
    Published: 36.5 (ImageNet zero-shot top-1); README of facebookresearch/SLIP (arXiv
    2112.12750).
    Settings: released code and README of SLIP: AdamW (0.9, 0.98, 1e-8), rate 1e-6 to 5e-4
    in one epoch (2,929 steps of about 12 million pairs), then a cosine to 1e-5, decay 0.5
    of matrices alone, batch 4,096, 35 epochs, log scale 0 to ln 100, light crops (0.5 to
    1).
    Deviations: bfloat16 autocast (released: fp16 with a scaled loss); gradients pass the
    gather of CLIP's term (released: they do not); seven prompts gave the published number.
    Expect: ingest of about 12,000,000 rows, then train/export, which open_clip loads; our
    number: not run.
    """
    return training_pipeline("cc12m-clip-vit-b-16", root)


def cc12m_slip_vit_b_16(root: str) -> Pipeline:
    """SLIP ViT-B/16 on CC12M, by SLIP's own recipe.

    Command: declip run cc12m-slip-vit-b-16 --sources.lists FILE
    Published: 40.7 (ImageNet zero-shot top-1); README of facebookresearch/SLIP (arXiv
    2112.12750).
    Settings: released code and README of SLIP: AdamW (0.9, 0.98, 1e-8), rate 1e-6 to 3e-3
    in one epoch (2,929 steps of about 12 million pairs), then a cosine to 1e-5, decay 0.1
    of matrices alone, batch 4,096, 35 epochs, log scale 0 to ln 100, light crops (0.5 to 1)
    for CLIP, two views of crops from 0.08 for SimCLR at temperature 0.1, batch norm
    synchronized.
    Deviations: bfloat16 autocast (released: fp16 with a scaled loss); gradients pass the
    gather of CLIP's term (released: they do not); seven prompts gave the published number.
    Expect: ingest of about 12,000,000 rows, then train/export, which open_clip loads; our
    number: not run.
    """
    return training_pipeline("cc12m-slip-vit-b-16", root)


CONCEPTUAL_RECIPES = (
    cc3m_clip_vit_b_32,
    cc3m_slip_vit_b_32,
    cc3m_filip_vit_b_32,
    cc3m_declip_vit_b_32,
    cc3m_defilip_vit_b_32,
    cc3m_clip_rn50,
    cc3m_declip_rn50,
    cc3m_clip_vit_b_16,
    cc3m_slip_vit_b_16,
    cc12m_clip_vit_b_32,
    cc12m_slip_vit_b_32,
    cc12m_filip_vit_b_32,
    cc12m_declip_vit_b_32,
    cc12m_defilip_vit_b_32,
    cc12m_clip_vit_b_16,
    cc12m_slip_vit_b_16,
)
"""Those of this file."""
