"""Notices that licences ask to be passed on with what comes from their material."""

from __future__ import annotations

# The licence wants notice and disclaimer word for word on every copy, changed copies included.
WORDNET = (
    "WordNet 3.1 Copyright 2011 by Princeton University. All rights reserved.\n\n"
    'THIS SOFTWARE AND DATABASE IS PROVIDED "AS IS" AND PRINCETON UNIVERSITY MAKES NO REPRESENTATIONS OR '
    "WARRANTIES, EXPRESS OR IMPLIED. BY WAY OF EXAMPLE, BUT NOT LIMITATION, PRINCETON UNIVERSITY MAKES NO "
    "REPRESENTATIONS OR WARRANTIES OF MERCHANTABILITY OR FITNESS FOR ANY PARTICULAR PURPOSE OR THAT THE USE "
    "OF THE LICENSED SOFTWARE, DATABASE OR DOCUMENTATION WILL NOT INFRINGE ANY THIRD PARTY PATENTS, "
    "COPYRIGHTS, TRADEMARKS OR OTHER RIGHTS.\n\n"
    "The name of Princeton University or Princeton may not be used in advertising or publicity pertaining to "
    "distribution of the software and/or database. Title to copyright in this software, database and any "
    "associated documentation shall at all times remain with Princeton University and LICENSEE agrees to "
    "preserve same."
)

REVIEWS = (
    "Attribution: D. Kotzias, M. Denil, N. de Freitas, P. Smyth, From Group to Individual Labels using Deep "
    "Features, KDD 2015; Sentiment Labelled Sentences, UCI Machine Learning Repository, CC BY 4.0 "
    "(https://creativecommons.org/licenses/by/4.0/). Changes made here: sentences of at most 24 words, each "
    "put into an instruction."
)
