"""Score captions for a picture with an exported model, without open_clip.

python examples/score_captions.py runs/demo/train/export picture.png "red apple emoji" "ship emoji"
"""

import sys
from pathlib import Path

import torch

from declip_train.augment import eval_images
from declip_train.export import load_export
from declip_train.tokenizer import CaptionTokenizer


def main(folder: str, picture: str, *captions: str) -> None:
    """Print each caption's probability, best first."""
    model = load_export(folder).model
    images = eval_images([Path(picture).read_bytes()], model.config.vision.image_size)
    tokens = torch.from_numpy(CaptionTokenizer(model.config.text.context_length)(captions))
    with torch.inference_mode():
        image = model.encode_image(images, normalize=True)
        text = model.encode_text(tokens, normalize=True)
        shares = (model.logit_scale.exp() * image @ text.T).softmax(dim=-1)[0]
    for share, caption in sorted(zip(shares.tolist(), captions, strict=True), reverse=True):
        print(f"{share:6.1%}  {caption}")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
