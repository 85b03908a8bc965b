/** Pairs of sentences that mean the same, of several lengths. */
export const SENTENCES = [
  'A cat sat on the mat.',
  'A kitten was resting on a rug.',
  'The stock market fell sharply on Monday.',
  'Shares lost much of their value at the start of the week.',
  'How do I reset my password?',
  'I forgot my login and need a new one, please send me instructions by mail as soon as you can.',
  'The recipe needs two eggs, a cup of flour and a pinch of salt.',
];
