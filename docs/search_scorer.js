/* What the search shows first: chapters, then the pages of results, then names of the package. */
var Scorer = {
  score: ([docname, , , , score]) => {
    if (/^notebooks\/[0-9A]/.test(docname)) return score + 200;
    if (/^(data\/results|notebooks)\//.test(docname)) return score + 100;
    return score;
  },
  objNameMatch: 11, objPartialMatch: 6, objPrio: { 0: 15, 1: 5, 2: -5 }, objPrioDefault: 0,
  title: 15, partialTitle: 7, term: 5, partialTerm: 2,
};
