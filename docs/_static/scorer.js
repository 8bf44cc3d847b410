/* The search shows pages that answer a question before lists of methods and measurements. */
const BONUS = [
  [/^(install|tutorial|choose|faq|glossary|user_guide)/, 3],
  [/^(results|development|changelog|sg_execution_times)/, -3],
];

var Scorer = {
  score: ([page, title, anchor, description, score]) => {
    for (const [pattern, bonus] of BONUS) if (pattern.test(page)) score += bonus;
    if (description && description.startsWith("Python method")) score -= 10;
    return score;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
