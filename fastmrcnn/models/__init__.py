"""The network, one file per stage; `mask_rcnn.py` is the page to read first."""
