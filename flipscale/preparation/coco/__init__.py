"""COCO's images with captions, or with questions and answers, as the paper's transfer learns from them."""
