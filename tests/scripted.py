"""Audits whose answers are known: a model that says what an image tells it to say, such images, a map that is a corner; tables and the page."""

import base64
import hashlib
import re
import weakref
from html.parser import HTMLParser

import pandas as pd
import torch
from torch import nn

from xai_companion import findings as find
from xai_companion.audit import audit
from xai_companion.data.items import ImageSet, Item
from xai_companion.explain import Explainer

NAMES = ["ant", "bee", "cat"]


class Scripted(nn.Module):
    "Says what the first pixel of an image tells it to say: the class in red, the confidence in green"

    def __init__(self, names=None, outputs=3):
        super().__init__()
        self.outputs, self.anchor = outputs, nn.Parameter(torch.zeros(1))
        if names:
            self.classes = names

    def forward(self, x):
        said, confidence = (x[:, 0, 0, 0] * 10).round().long(), x[:, 1, 0, 0].double().clamp(0.01, 0.999)
        odds = confidence / (1 - confidence) * (self.outputs - 1)
        return (nn.functional.one_hot(said, self.outputs) * odds.log()[:, None]).float()


class Corner(Explainer):
    "A map that is 1 in the left upper quarter"

    def compute(self, images, target):
        maps = torch.zeros_like(images[:, :1])
        maps[..., : images.shape[2] // 2, : images.shape[3] // 2] = 1
        return maps


class Cards(ImageSet):
    "Images that carry their answer: (label, predicted, confidence, columns that the object has)"
    name, split, classes = "cards", "test", NAMES

    def __init__(self, cards, side=8, names=None):
        self.cards, self.side, self.names = cards, side, names
        self.fingerprint, self.alive, self.most, self.read = f"{len(cards)} cards", weakref.WeakSet(), 0, 0

    def __len__(self):
        return len(self.cards)

    def __getitem__(self, index):
        label, predicted, confidence, columns = self.cards[index]
        image = torch.full((3, self.side, self.side), 0.5)
        image[0, 0, 0], image[1, 0, 0] = predicted / 10, confidence
        self.alive.add(image)
        self.most, self.read = max(self.most, len(self.alive)), self.read + 1
        box = None if columns is None else torch.tensor([[0.0, 0, columns, self.side]])
        name = self.names[index] if self.names else f"{index}.png"
        return Item(name, image, (label,), box, () if box is None else (label,))


CARDS = [(0, 0, 0.92, 4), (0, 0, 0.72, 8), (0, 1, 0.97, 2), (0, 1, 0.63, 4), (1, 1, 0.94, 4), (1, 0, 0.83, 8), (2, 2, 0.55, None)]


def run(cards=CARDS, **options):
    model = options.pop("model", None) or Scripted(NAMES)
    return audit(model, Cards(cards), Corner(model), **options)


class Page(HTMLParser):
    "Elements, addresses, cells and text of a page"

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.rows, self.cell, self.text, self.policy = [], [], [], None, "", ""
        self.feed(text)

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes).get("class")))
        self.addresses += [value for key, value in attributes if key in ("src", "href", "srcset", "data", "action", "poster")]
        if dict(attributes).get("http-equiv") == "Content-Security-Policy":
            self.policy = dict(attributes)["content"]
        if name == "tr":
            self.rows.append([])
        self.cell = name if name in ("td", "th") else self.cell
        if name in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, name):
        self.cell = None if name in ("td", "th") else self.cell

    def handle_data(self, data):
        if self.cell:
            self.rows[-1][-1] += data
        self.text += data.replace("\u00a0", " ")


def check_self_contained(text):
    page = Page(text)
    assert all(a.startswith(("data:image/", "#")) for a in page.addresses)
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.S))
    assert "url(" not in style and "@import" not in style and "default-src 'none'; img-src data:;" in page.policy
    for kind in ("style", "script"):
        [inside] = re.findall(rf"<{kind}>(.*?)</{kind}>", text, re.S)
        assert f"{kind}-src 'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'" in page.policy
    anchors = set(re.findall(r' id="([^"]+)"', text))
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= anchors
    return page


def facts_of(*rows):
    "A table of (label, predicted, confidence) and, where the place of the object is known, (..., EBPG, area)"
    columns = ["label", "predicted", "confidence", "ebpg", "area"][: len(rows[0])]
    return find.with_focus(pd.DataFrame(rows, columns=columns).assign(position=range(len(rows)), drop=0.25))
