"""Why a hospital refuses: every code that can leave it for a rule of its own policy, with its words.

The words are the server's. A code says which rule, never by how much, nor anything about a patient.
"""

REFUSALS: dict[int, str] = {
    2001: "the site has no policy, or one that is not valid",
    2002: "the site's policy does not allow this task",
    2003: "the site's policy requires differential privacy",
    2004: "the site allows noise from a seed in simulations only",
    2005: "the site's policy does not allow a column of the schema",
    2006: "the share of test patients is outside the site's policy",
    2007: "settings of privacy came without asking for it, or it was asked for without them",
    2008: "the site's policy lets no loss leave without differential privacy",
    2009: "the site has not approved the bundle of this run: 'python -m client approve' there",
    2010: "the site runs another version of the app than the bundle of this run",
    2101: "the noise multiplier is below the site's policy",
    2102: "the noise multiplier is beyond what can be accounted for",
    2103: "the sampling rate is above the site's policy",
    2104: "the sampling rate must be above 0",
    2105: "delta is above the site's policy",
    2106: "delta must be above 0",
    2107: "the clipping norm is outside the site's policy",
    2108: "the draws per patient are above the site's policy",
    2109: "the steps of a round are above the site's policy",
    2110: "the rounds of a run are above the site's policy",
    2111: "the steps of the run are above the site's policy",
    2112: "the steps of this round lie beyond the run's",
    2113: "the noise on group counts is below the site's policy",
    2114: "the noise on histograms or tables of counts is below the site's policy",
    2115: "the noise on scores is below the site's policy",
    2116: "histograms and tables of counts are not allowed by the site's policy",
    2120: "the learning rate is beyond the site's policy",
    2121: "the batch size is above the site's policy",
    2122: "a proximal term is not used with privacy",
    2123: "the site's policy declares no number of patients",
    2130: "the site's policy does not allow noise that sites share",
    2131: "fewer sites would share the noise than the site's policy asks for",
    2132: "fewer colluding sites are reckoned with than the site's policy asks for",
    2133: "a site that would share the noise is not among those that the site's policy knows",
    2134: "the keys for masks are not what their sites signed, or not this site's own of now",
    2135: "one at least of the sites that share the noise has to be honest",
    2136: "the site's policy allows noise that sites share only",
    2140: "the site's policy lets no tables of counts leave without noise",
    2141: "more tables or cells of counts were asked for than the site's policy allows",
    2142: "the text does not describe tables of counts of the site's schema",
    2201: "the model is larger than the site's policy allows",
    2202: "the model was described in a text longer than the site reads",
    2203: "the text does not describe a model",
    2204: "the model is for tables of another schema",
    2301: "a parameter is missing",
    2302: "there are parameters that the model does not have",
    2303: "a parameter has another type than float32",
    2304: "a parameter has another shape",
    2305: "a parameter has values that are not finite",
    2306: "a parameter has values that are too large",
    2307: "the parameters are larger than the site accepts",
}

OF_FAULT = {"missing": 2301, "unknown": 2302, "dtype": 2303, "shape": 2304, "finite": 2305, "size": 2306}
"""Code of each fault of parameters."""

BUSY, ENDED, TOO_LONG, STOPPED, UNLOGGED = 1020, 1021, 1022, 1023, 1024

FAILURES: dict[int, str] = {
    BUSY: "another process at the site works on its data",
    ENDED: "the site's worker ended unexpectedly, perhaps for want of memory",
    TOO_LONG: "the site took longer than it allows itself",
    STOPPED: "the site was stopped",
    UNLOGGED: "the site could not write its audit log",
}
"""Why a hospital's daemon gave no answer; the words are the server's."""

RUNTIME_FAILURES: dict[int, str] = {
    5: "the site's node is not connected any more",
    7: "the site has not approved the bundle of this run: 'python -m client approve' there",
    8: "the site's program stopped responding",
}
"""Codes of Flower's own."""
