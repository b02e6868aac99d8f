"""The corpus that the 2023 kit published, merged from the six others: JSON lines that are Records already, 5 GB."""
from dataclasses import replace

from rlhfkit.formats import stream_records
from rlhfkit.sources.raw import TEMPLATES, files, first_share, share

LAYOUT = ("*_data_external_v1.jsonl",)


def read(folder, rejected, seed=0, template=TEMPLATES["HEAD"], part=(0, 1)):
    """`{"prompt", "answers": [{"answer", "score"}], "prefix"}` lines → the same Records; its templates are what they are. Its dev file
    is the beginning of its train file, so only one of them is read."""
    for path in files(folder, LAYOUT)[-1:]:             # train, where both are
        for record in share(stream_records(path, first_share(rejected, part)), part):
            yield record if record.source else replace(record, source="published")
