"""What a model card can say, by what the model does."""

EMBEDS = """# {name}

A model of images and texts: it embeds both so that an image lies near the words that describe it. Trained by masking
([FLIP](https://arxiv.org/abs/2212.00794): in training, the image encoder sees only the patches that a random mask
leaves) with flipscale {version}.

{parameters} parameters; images of {image_size} x {image_size} pixels in patches of {patch_size} x {patch_size};
captions of up to {max_tokens} tokens; embeddings of {dim} numbers.

> **Still in training.** This is step {unfinished_step} of {length}.

## Use

```python
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="{where}", trust_remote_code=True)
print(classify("image.png", candidate_labels=["a red apple", "a bicycle"], hypothesis_template="{{}}"))
```

Embeddings, for search or as features:

```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{where}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{where}", trust_remote_code=True)
inputs = processor(images=Image.open("image.png"), text=["a red apple", "a bicycle"], return_tensors="pt")
with torch.no_grad():
    output = model(**inputs)
print(output.image_embeds @ output.text_embeds.T)
```

The same of [sentence-transformers](https://sbert.net), 6.0 or later, by which mteb evaluates it too:

```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{where}", trust_remote_code=True)
images, texts = model.encode([Image.open("image.png")]), model.encode(["a red apple", "a bicycle"])
print(model.similarity(images, texts))
```

`trust_remote_code` runs the model's code that is in this folder. Where flipscale is installed it is not needed:
`from flipscale.model import FlipModel`. The weights are safetensors, fp32; in half the bytes with
`variant="bf16", dtype=torch.bfloat16`.
"""

CLASSIFIES = """# {name}

A model of images: it names one of {num_labels} classes, such as {labels}. Fine-tuned{base} with flipscale {version}
([FLIP](https://arxiv.org/abs/2212.00794)).

{parameters} parameters; images of {image_size} x {image_size} pixels in patches of {patch_size} x {patch_size}.

> **Still in training.** This is step {unfinished_step} of {length}.

## Use

```python
from transformers import pipeline

classify = pipeline("image-classification", model="{where}", trust_remote_code=True)
print(classify("image.png"))
```

`trust_remote_code` runs the model's code that is in this folder. Where flipscale is installed it is not needed:
`from flipscale.model import FlipForImageClassification`. The weights are safetensors, fp32; in half the bytes with
`variant="bf16", dtype=torch.bfloat16`.
"""

WRITES = """# {name}

A model of images: it writes captions. Trained by masking ([FLIP](https://arxiv.org/abs/2212.00794): in training, image
encoder and decoder see only the patches that a random mask leaves) with flipscale {version}.

{parameters} parameters; images of {image_size} x {image_size} pixels in patches of {patch_size} x {patch_size};
captions of up to {max_tokens} tokens.

> **Still in training.** This is step {unfinished_step} of {length}.

## Use

```python
from transformers import pipeline

write = pipeline("image-text-to-text", model="{where}", trust_remote_code=True)
print(write(images="image.png", text=""))  # or the words that the caption begins with
```

By beams, and many images at a time:

```python
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{where}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{where}", trust_remote_code=True)
inputs = processor(images=[Image.open("image.png")], return_tensors="pt")
print(processor.batch_decode(model.generate(**inputs, num_beams=4), skip_special_tokens=True))
```

`trust_remote_code` runs the model's code that is in this folder. Where flipscale is installed it is not needed:
`from flipscale.model import FlipForConditionalGeneration`. The weights are safetensors, fp32; in half the bytes with
`variant="bf16", dtype=torch.bfloat16`.
"""

ANSWERS = """# {name}

A model of images: it answers questions about them, always by one of {num_labels} answers, such as {labels}.
Fine-tuned{base} with flipscale {version} ([FLIP](https://arxiv.org/abs/2212.00794)).

{parameters} parameters; images of {image_size} x {image_size} pixels in patches of {patch_size} x {patch_size};
questions of up to {max_tokens} tokens.

> **Still in training.** This is step {unfinished_step} of {length}.

## Use

```python
import torch
from PIL import Image
from transformers import AutoModelForVisualQuestionAnswering, AutoProcessor

model = AutoModelForVisualQuestionAnswering.from_pretrained("{where}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{where}", trust_remote_code=True)
inputs = processor(images=Image.open("image.png"), text="What is in the picture?", return_tensors="pt")
with torch.no_grad():
    scores = model(**inputs).logits[0].sigmoid()  # of each answer, from 0 to 1; their sum is not 1
print(model.config.id2label[scores.argmax().item()])
```

`trust_remote_code` runs the model's code that is in this folder. Where flipscale is installed it is not needed:
`from flipscale.model import FlipForQuestionAnswering`. The weights are safetensors, fp32; in half the bytes with
`variant="bf16", dtype=torch.bfloat16`.
"""

ALSO_WRITES = """It has learned to write captions too:

```python
from transformers import pipeline

write = pipeline("image-text-to-text", model="{where}", trust_remote_code=True)
print(write(images="image.png", text=""))  # or the words that the caption begins with
```
"""

OF_ALL = """## Results

{results}

{protocol}

{figures}

## Training

| | |
|---|---|
| training data | {data} |
| pairs in it | {data_samples} |
| pairs seen | {samples_seen} |
| time | {time} |
| hardware | {hardware} |
| speed | {pairs_per_s} pairs/s |
| precision | {precision} |
| energy | {energy} kWh, {measured} |
| emissions | {emissions} kg of CO2, at {grid} g a kWh and a PUE of {pue}, without the making of the machines |
| cost | {cost} dollars, at {price} an hour of a device |

| stage | pairs | patches removed | tokens removed | peak rate for 256 pairs |
|---|---:|---:|---:|---:|
{stages}

<details><summary>The recipe, as far as it decides what is learned</summary>

```yaml
{recipe}
```

</details>

{audit}

## Limits and biases

The model has learned from the pairs named above and from nothing else, and carries their biases, harmful ones included.
FLIP's authors say so of their own models, trained on pairs from the web: the weights reflect the biases of the data,
and where models of different data are compared, those biases are part of what is compared. Captions from the web
are noisy, mostly English, and uneven over people, places and cultures.

It was tested on what the results above name and on nothing else: not for fairness between groups of people, not for
robustness, not in other languages. A classifier always picks one of its labels, or of those that it is given, however
unfit. It is not meant for surveillance, for recognising people, or for decisions about them.

## Licence

The licence of these weights is {licence}.

{no_licence}

## Citation

```bibtex
@inproceedings{{li2023scaling,
  title={{Scaling Language-Image Pre-training via Masking}},
  author={{Li, Yanghao and Fan, Haoqi and Hu, Ronghang and Feichtenhofer, Christoph and He, Kaiming}},
  booktitle={{CVPR}},
  year={{2023}}
}}
```
"""

# A paragraph or table row whose fields are unknown is left out.
TEMPLATES = {
    "embeds": f"{EMBEDS}\n{OF_ALL}",
    "embeds and writes": f"{EMBEDS}\n{ALSO_WRITES}\n{OF_ALL}",
    "writes": f"{WRITES}\n{OF_ALL}",
    "classifies": f"{CLASSIFIES}\n{OF_ALL}",
    "answers": f"{ANSWERS}\n{OF_ALL}",
}
