"""Count in how many passages of open texts each word occurs: the words of texts that are scored without an index.

    python scripts/background_words.py FOLDER_OF_DATA_SETS

writes ``src/d2llm/shipped/words/{english,chinese}.npz`` (``d2llm.store.background_words``). The texts are those of data
sets whose licences permit it (``_SOURCES``; shipped/words/README.md names them), without the passages that measurements
look for. Of a large set, every n-th passage is counted, so that no subject prevails. Words of a single passage are left
out: they count as the rarest, like unknown ones.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from d2llm.core.shipped import WordLanguage, background_words
from d2llm.data.beir import read_beir
from d2llm.store.background_words import BackgroundWords
from d2llm.store.word_segment import WordSegment

_SOURCES: dict[WordLanguage, tuple[str, ...]] = {
    "english": ("squad", "covidqa", "medquad"),
    "chinese": ("cmrc2018", "drcd"),
}
_MOST_PASSAGES = 2_700  # of a data set


def main() -> None:
    """Count, write and print sizes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    folder = parser.parse_args().data
    for language, names in _SOURCES.items():
        texts = [text for name in names for text in passages(folder / name)]
        table = BackgroundWords.count(WordSegment.from_texts(texts))
        path = background_words(language)
        table.write(path)
        print(f"{path.name}: {len(texts):,} passages, {len(table.terms):,} terms, {path.stat().st_size:,} bytes")


def passages(folder: Path) -> list[str]:
    """The texts of a data set's passages, by id, but for those that dev or test queries look for: all, or one in n."""
    data = read_beir(folder, splits=["dev", "test"])
    measured = {passage_id for split in data.qrels.values() for judged in split.values() for passage_id in judged}
    texts = [data.passages[passage_id].full_text for passage_id in sorted({*data.passages} - measured)]
    return texts[:: -(-len(texts) // _MOST_PASSAGES)]


if __name__ == "__main__":
    main()
